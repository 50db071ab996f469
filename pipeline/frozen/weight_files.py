"""Which weight files a loader takes out of a folder, and whether they are whole.

transformers and diffusers take safetensors before .bin, one file before shards, and a variant
(`*.fp16.*`) only where it is asked for; open_clip has an order of its own.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from pipeline.frozen.backbones import BackboneError, Role

_NAME = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)(\.(?P<variant>\w+))?"
    r"(-\d+-of-\d+)?\.(?P<format>safetensors|bin)"
)
_OPEN_CLIP = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
_VARIANTS = ("fp16", "bf16")  # before others, where there is no plain file
_POINTER = b"version https://git-lfs"


class Weights(NamedTuple):
    """What a loader takes in one folder, relative to the model's: one file, or shards."""

    folder: str
    files: tuple[str, ...]
    format: Literal["safetensors", "bin"]
    variant: str | None


def loaded_weights(role: Role, names: Sequence[str]) -> dict[str, Weights]:
    """Folder -> what its loader takes, of the names of all files of a model.

    Folders that no loader knows how to read are absent.
    """
    if role == "visual_encoder":
        chosen = next((name for name in _OPEN_CLIP if name in names), None)
        format_: Literal["safetensors", "bin"] = (
            "safetensors" if str(chosen).endswith(".safetensors") else "bin"
        )
        return {} if chosen is None else {"": Weights("", (chosen,), format_, None)}
    found: dict[str, dict[tuple[str | None, str], list[str]]] = {}
    for name in names:
        path = PurePosixPath(name)
        folder = "" if str(path.parent) == "." else str(path.parent)
        known = _NAME.fullmatch(path.name)
        if known and (role == "image_generator") == (folder != "") and "/" not in folder:
            kinds = found.setdefault(folder, {})
            kinds.setdefault((known["variant"], known["format"]), []).append(name)
    loaded = {}
    for folder, kinds in found.items():
        variant, format_name = min(kinds, key=_preference)
        files = tuple(sorted(kinds[variant, format_name]))
        # One whole file goes before shards.
        whole = tuple(file for file in files if "-of-" not in file)
        loaded[folder] = Weights(folder, whole[:1] or files, format_name, variant)  # type: ignore[arg-type]
    return loaded


def weights_in(role: Role, folder: Path) -> dict[str, Weights]:
    """The same for a folder on this machine."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return loaded_weights(role, names)


def variant_of(role: Role, folder: str | Path) -> str | None:
    """The variant that has to be asked for, where there is no plain file; None otherwise."""
    if not Path(folder).is_dir():
        return None
    variants = [weights.variant for weights in weights_in(role, Path(folder)).values()]
    return next((variant for variant in variants if variant is not None), None)


def _preference(kind: tuple[str | None, str]) -> tuple[int, int, str]:
    variant, format_ = kind
    ranks = (None, *_VARIANTS)
    rank = ranks.index(variant) if variant in ranks else len(ranks)
    return rank, format_ != "safetensors", variant or ""


def read_shapes(role: Role, folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Component (a folder's name) -> tensor -> shape, of the headers alone.

    Raises BackboneError with a line for each file that is a git-lfs pointer, truncated or absent.
    """
    problems: list[str] = []
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for component, weights in weights_in(role, folder).items():
        problems += _absent_shards(folder, weights)
        shapes[component] = {}
        for name in weights.files:
            try:
                shapes[component] |= dict(_shapes(folder / name, role))
            except BackboneError as error:
                problems.append(str(error))
    if problems:
        raise BackboneError("\n".join(problems))
    return shapes


def _absent_shards(folder: Path, weights: Weights) -> list[str]:
    """Lines about shards that an index names and that are not there."""
    if "-of-" not in weights.files[0]:
        return []
    stem = re.sub(r"(\.\w+)?-\d+-of-\d+\.\w+$", "", PurePosixPath(weights.files[0]).name)
    middle = f"{weights.variant}." if weights.variant else ""
    index = folder / weights.folder / f"{stem}.{weights.format}.index.{middle}json"
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except FileNotFoundError:
        return [f"{index} is missing: without it nobody knows which tensor is in which shard"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return [f"{index} is no index of shards: {error}"]
    missing = sorted(name for name in set(named) if not (index.parent / str(name)).is_file())
    return [f"{index} names {name}, which is not there: fetch it" for name in missing]


def _shapes(file: Path, role: Role) -> Iterator[tuple[str, tuple[int, ...]]]:
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise BackboneError(
                f"{file} is a git-lfs pointer, not weights: run `git lfs pull` in {file.parent}"
            )
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for name in list(opened.keys()):  # it is no mapping
                    yield name, tuple(opened.get_slice(name).get_shape())
            return
        mapped = zipfile.is_zipfile(file)
        content = torch.load(file, map_location="meta", weights_only=True, mmap=mapped or None)
    except (SafetensorError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        if re.search(r"GLOBAL .* (is blocked|was not an allowed)", str(error)):
            raise BackboneError(
                f"{file} holds Python objects, which are never loaded: get the weights as "
                "safetensors"
            ) from error
        size = file.stat().st_size
        first = str(error).split("\n")[0][:200]
        raise BackboneError(
            f"{file} ({size:,} bytes) is truncated or no weights ({first}): fetch it again"
        ) from error
    tensors = content if isinstance(content, dict) else {}
    if role == "visual_encoder":  # open_clip alone looks inside
        tensors = tensors.get("state_dict", tensors)
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            yield name, tuple(tensor.shape)
