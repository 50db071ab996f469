"""Trained tensors on disk: safetensors with the record of what made them, never half-written.

| file | for | holds |
|---|---|---|
| `best.safetensors`, `last.safetensors` | everybody | the trained tensors; record |
| `state.safetensors` | resuming | the same, optimiser, generators, curve, data position |

The record and other small things are JSON in the files' own metadata, so that a file is replaced in
one step and what lies in it belongs together. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gill_errors import GillError
from gill_files import force_to_disk, hash_of, written_whole
from gill_records import Record, differences
from pipeline.bridge.heads import Heads, HeadSizes

CurvePoint = dict[str, int | float]
"""Numbers by name, `step` among them."""

_METADATA = "gill"

BEST, LAST, STATE = "best.safetensors", "last.safetensors", "state.safetensors"
Checkpoint = Literal["last", "best"]
CHECKPOINTS: dict[Checkpoint, str] = {"last": LAST, "best": BEST}


class CheckpointError(GillError):
    """A checkpoint that is missing, damaged or made for something else; the message says what."""


class CheckpointRecord(Record):
    """What a set of trained tensors is, and what made it."""

    format: Literal["gill-heads-1"] = "gill-heads-1"
    sizes: HeadSizes
    backbones: dict[str, str] = Field(
        default={}, description="fingerprint of each frozen model, by role"
    )
    parameters: dict[str, Any] = Field(
        default={}, description="the sections of parameters behind these tensors"
    )
    step: int = Field(default=0, ge=0, description="optimiser steps taken")
    metrics: dict[str, float] = Field(default={}, description="measured at this step")


@dataclass(frozen=True)
class TrainingState:
    """Everything from which training goes on as if it had never stopped."""

    record: CheckpointRecord
    heads: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """`NAME of the trained tensor|KEY of the optimiser's state`."""
    generators: dict[str, Tensor]
    """States of random generators, uint8."""
    data: dict[str, Any]
    """Position in the data, as its source describes it (JSON)."""
    curve: list[CurvePoint]
    """What was logged so far."""


def save_heads(path: str | Path, heads: Heads, record: CheckpointRecord) -> None:
    """Write the trained tensors and their record, replacing `path` in one step."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in heads.state_dict().items()}
    _write(Path(path), tensors, {"record": record.model_dump(mode="json")})


def load_heads(
    path: str | Path,
    *,
    sizes: HeadSizes | None = None,
    backbones: Mapping[str, str] | None = None,
) -> tuple[Heads, CheckpointRecord]:
    """Read trained tensors, in the dtype they were saved in, on the CPU.

    `sizes` and `backbones`, where given, must be those of the checkpoint.

    Raises CheckpointError when the file is missing or damaged, tensors do not fit their record, or
    something differs; every difference is named.
    """
    # By the record first: what does not fit is named before any tensor is read.
    record = read_record(path)
    found = _differing_sizes(record.sizes, sizes) if sizes else []
    found += _differing_backbones(record.backbones, backbones) if backbones else []
    if found:
        raise CheckpointError(f"{path} does not fit: " + "; ".join(found))
    tensors, _ = _read(Path(path))
    # The record does not state it; all tensors of a file have one.
    saved_dtype = next((tensor.dtype for tensor in tensors.values()), torch.float32)
    heads = Heads(record.sizes).to(saved_dtype)
    put_tensors(heads, tensors, Path(path))
    return heads, record


def put_tensors(heads: Heads, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy `tensors` into `heads`. Raises CheckpointError naming all that do not fit."""
    own = heads.state_dict()
    problems = misfits(tensors, own)
    # `load_state_dict` would convert another dtype in silence.
    problems += [
        f"{name} is {tensors[name].dtype}, expected {tensor.dtype}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].dtype != tensor.dtype
    ]
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(sorted(problems)))
    heads.load_state_dict(dict(tensors))


def misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """How tensors differ from the expected ones in names and shapes, one phrase each."""
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    return [
        *(f"missing {name} {list(expected[name].shape)}" for name in missing),
        *(f"unknown {name} {list(tensors[name].shape)}" for name in unknown),
        *(
            f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ),
    ]


def read_record(path: str | Path) -> CheckpointRecord:
    """The record of a checkpoint or training state, without its tensors."""
    return _parse_record(Path(path), _read_metadata(Path(path)))


def save_state(path: str | Path, state: TrainingState) -> None:
    """Write a training state, replacing `path` in one step."""
    groups = {
        "heads": state.heads,
        "optimizer": state.optimizer,
        "generators": state.generators,
    }
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, named in groups.items()
        for name, tensor in named.items()
    }
    metadata = {
        "record": state.record.model_dump(mode="json"),
        "data": state.data,
        "curve": state.curve,
    }
    _write(Path(path), tensors, metadata)


def load_state(path: str | Path) -> TrainingState:
    """Read a training state. Raises CheckpointError when it is missing or damaged."""
    path = Path(path)
    tensors, metadata = _read(path)
    # Tensors are named GROUP/NAME; no name of ours holds a slash.
    groups: dict[str, dict[str, Tensor]] = {"heads": {}, "optimizer": {}, "generators": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        if group not in groups:
            raise CheckpointError(f"{path} is not a training state: unknown tensor {name}")
        groups[group][rest] = tensor
    try:
        data, curve = metadata["data"], metadata["curve"]
    except KeyError as error:
        raise CheckpointError(f"{path} is not a training state: no {error} in it") from None
    return TrainingState(_parse_record(path, metadata), data=data, curve=curve, **groups)


def unlike_run(there: CheckpointRecord, here: CheckpointRecord) -> list[str]:
    """How the making of a checkpoint differs from this run, one sentence each."""
    found = _differing_sizes(there.sizes, here.sizes)
    found += _differing_backbones(there.backbones, here.backbones)
    return found + _differing_values("", there.parameters, here.parameters)


def _differing_sizes(there: HeadSizes, here: HeadSizes) -> list[str]:
    return _differing_values("size ", there.model_dump(), here.model_dump())


def _differing_backbones(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    return [
        f"the {role.replace('_', ' ')} is another one: {there.get(role, 'none')[:12]} in the "
        f"checkpoint, {here.get(role, 'none')[:12]} here"
        for role in sorted(there.keys() | here.keys())
        if there.get(role) != here.get(role)
    ]


def _differing_values(prefix: str, there: Any, here: Any) -> list[str]:
    # As JSON: what was read back from it holds lists where a model holds tuples.
    found = differences(json.loads(json.dumps(there)), json.loads(json.dumps(here)))
    return [
        f"{prefix}{key} is {theirs} in the checkpoint, {ours} here" for key, theirs, ours in found
    ]


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write beside `path`, force to disk, rename over it: a reader sees the old file or the new."""
    # One entry: safetensors keeps no order among several, and equal contents shall be equal bytes.
    text = json.dumps(metadata, allow_nan=False)
    # The contents reach the disk before the name does, then the name (it lies in the folder): after
    # a power cut the name never stands for half a file.
    with written_whole(path) as part:
        save_file(tensors, part, metadata={_METADATA: text})
        force_to_disk(part)
    force_to_disk(path.parent)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata = _read_metadata(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            return {} if text is None else json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: nothing was saved there yet") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error


def _parse_record(path: Path, metadata: dict[str, Any]) -> CheckpointRecord:
    if "record" not in metadata:
        raise CheckpointError(f"{path} holds no record of what made it")
    try:
        return CheckpointRecord.model_validate(metadata["record"])
    except ValidationError as error:
        raise CheckpointError(f"{path}: its record cannot be read: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, heads: Heads) -> dict[str, Tensor]:
    """The optimiser's state by tensor name, for `TrainingState.optimizer`."""
    return {
        f"{name}|{key}": value
        for name, parameter in heads.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def put_optimizer_tensors(
    optimizer: torch.optim.Optimizer, heads: Heads, tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimiser back what `optimizer_tensors` took; its settings stay as they are."""
    names = {parameter: name for name, parameter in heads.named_parameters()}
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    index = {names[parameter]: i for i, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    # torch numbers parameters in the order in which the optimiser got them: that of the heads.
    for joined, tensor in tensors.items():
        name, _, key = joined.rpartition("|")
        state.setdefault(index[name], {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def fingerprint_heads(path: Path) -> str:
    """SHA-256 of a checkpoint file: what an index was built with."""
    return hash_of(path)
