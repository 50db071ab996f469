"""Trained heads that exist: a checkpoint of ours, a released folder, or the hub's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from gill_errors import StageError
from pipeline.bridge.checkpoint import BEST, LAST, CheckpointRecord, load_heads
from pipeline.bridge.heads import Heads
from pipeline.bridge.upstream import DECISION_FILE, import_decision, import_heads
from pipeline.frozen.backbones import Backbones
from pipeline.talking.decision import DecisionModel
from settings.params import Params

RELEASED = "model_args.json"


@dataclass(frozen=True)
class TrainedWeights:
    """Heads, what is known of how they were made, and a classifier where there is one."""

    heads: Heads
    record: CheckpointRecord
    decision: DecisionModel | None


def read_weights(source: str, params: Params, backbones: Backbones) -> TrainedWeights:
    """Read `training.weights` or `training.start_from`, and check that they fit the run.

    Raises StageError naming every size and frozen model that differs, CheckpointError and
    UpstreamError for damaged files, HubError for a name that the hub does not have.
    """
    found = _read(source, params, backbones)
    _refuse_misfits(source, found, params, backbones)
    return found


def read_captioning(source: str, params: Params, backbones: Backbones) -> nn.Linear:
    """Read the W_cap of `training.captioning_from`; the other sizes may be others than here.

    Raises as `read_weights`.
    """
    found = _read(source, params, backbones)
    _refuse_misfits(source, found, params, backbones, ("d", "e", "model.k"))
    return found.heads.caption_projection


def _read(source: str, params: Params, backbones: Backbones) -> TrainedWeights:
    path = Path(source)
    if (path / RELEASED).is_file():
        heads, arguments = import_heads(path)
        record = CheckpointRecord(
            sizes=heads.sizes,
            backbones=backbones.fingerprints,
            parameters={"released": arguments.model_dump(mode="json")},
        )
        decision = None
        if (path / DECISION_FILE).is_file():
            decision = DecisionModel.from_linear(*import_decision(path))
        return TrainedWeights(heads, record, decision)
    chosen = f"{params.training.checkpoint}.safetensors"
    for file in (path, path / chosen, path / LAST, path / BEST):
        if file.is_file():
            return TrainedWeights(*load_heads(file), decision=None)
    return _saved_pretrained(source, params)


def _saved_pretrained(source: str, params: Params) -> TrainedWeights:
    """What `Gill.save_pretrained` wrote, here or on the hub."""
    from gill.hub import find_folder, load_trained

    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise StageError(
            f"{source} holds no trained heads: neither *.safetensors of `stages train`, nor "
            f"{RELEASED} of a released checkpoint, nor config.json of save_pretrained"
        )
    folder = find_folder(source, None, not params.backbones.allow_download)
    _, heads, record = load_trained(folder)
    decision = DecisionModel.load(folder) if (folder / "decision.json").is_file() else None
    return TrainedWeights(heads, record, decision)


def _refuse_misfits(
    source: str,
    found: TrainedWeights,
    params: Params,
    backbones: Backbones,
    compared: Sequence[str] | None = None,
) -> None:
    """Raise StageError for what the heads and this run say differently.

    Of the sizes only those `compared`, by the first word of their names; None: all.
    """
    sizes, model, widths = found.heads.sizes, params.model, backbones.widths
    here = {
        "d (visual width)": (sizes.d, widths["d"]),
        "e (language model's width)": (sizes.e, widths["e"]),
        "L (text positions)": (sizes.L, widths["L"]),
        "D (generator's text width)": (sizes.D, widths["D"]),
        "D_pooled": (sizes.D_pooled, widths["D_pooled"]),
        **{f"model.{n}": (getattr(sizes, n), getattr(model, n)) for n in ("k", "r", "m", "p")},
        **{
            f"model.mapper.{name}": (value, getattr(model.mapper, name))
            for name, value in sizes.mapper.model_dump().items()
        },
    }
    wrong = [
        f"{name} is {theirs} in the weights, {ours} here"
        for name, (theirs, ours) in here.items()
        if theirs != ours and (compared is None or name.split()[0] in compared)
    ]
    ours = backbones.fingerprints
    wrong += [
        f"they were trained with another {role} ({theirs[:12]}, here {ours[role][:12]})"
        for role, theirs in found.record.backbones.items()
        if role in ours and theirs != ours[role]
    ]
    if wrong:
        raise StageError(f"{source} does not fit: " + "; ".join(wrong))
