"""Whether the small files of a frozen model are whole, before anything is made of them.

What a library raises for a broken file names neither the file nor what to do.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gill_errors import GillError
from pipeline.frozen.backbones import BackboneError, Role
from pipeline.frozen.pinning import MODEL_FILE
from pipeline.frozen.text_conditioner import load_parts
from pipeline.frozen.weight_files import weights_in

_TEXTS = (".json", ".txt", ".model", ".jinja")
_READ = (*_TEXTS, ".safetensors", ".bin")
_POINTER = b"version https://git-lfs"
# What else is called .json may hold anything.
_RECORDS = (
    *("config.json", "model_index.json", "open_clip_config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "scheduler_config.json"),
)


def check_files(role: Role, folder: Path) -> None:
    """Refuse files that are git-lfs pointers, links to nothing, no JSON, or lists of absent shards.

    Raises BackboneError, a line for each of them.
    """
    problems = []
    components = weights_in(role, folder)
    for path in sorted(folder.rglob("*")):
        if path.suffix not in _READ or path.relative_to(folder).as_posix().startswith("."):
            continue
        problem = _problem(path)
        where = path.parent.relative_to(folder).as_posix().removeprefix(".")
        if problem is None and ".index." in path.name and where not in components:
            problem = _absent_shard(path)
        if problem is not None:
            problems.append(f"{path} {problem}")
    if problems:
        raise BackboneError("\n".join(problems))


@contextmanager
def naming(role: Role, source: str) -> Iterator[None]:
    """Errors of whatever kind that a foreign configuration leads to, as one line that names it."""
    try:
        yield
    except (GillError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise BackboneError(
            f"{role} {source}: nothing can be made of its {MODEL_FILE[role]}: "
            f"{type(error).__name__}: {said}"
        ) from error


def check_generator_parts(folder: Path) -> None:
    """Make the parts of an image generator that have no weights: tokenizers and scheduler.

    Raises BackboneError: they cannot be made, or a tokenizer knows no words.
    """
    networks = ("unet", "vae", "text_encoder", "text_encoder_2")
    try:
        with warnings.catch_warnings(action="ignore"):  # of old settings, which still serve
            pipeline = load_parts(str(folder), torch.float32, without=networks)
    except Exception as error:  # whatever the classes stumble over that its files name
        said = " ".join(str(error).split())[:300]
        raise BackboneError(
            f"image_generator {folder}: its tokenizer or scheduler cannot be made: {said}"
        ) from error
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name, None)
        # transformers makes an empty one where its files are missing, and says nothing.
        if tokenizer is not None and tokenizer("a")["input_ids"] == tokenizer("b")["input_ids"]:
            raise BackboneError(f"{folder / name} has no tokenizer: files are missing")


def _problem(path: Path) -> str | None:
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which is not there: fetch it"
    if path.suffix not in _TEXTS or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                return f"is a git-lfs pointer: run `git lfs pull` in {path.parent}"
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name in _RECORDS and not isinstance(content, dict):
                return "holds no object {...}: fetch it again"
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"is not JSON ({reason}): fetch it again"
    return None


def _absent_shard(index: Path) -> str | None:
    content: Any = json.loads(index.read_bytes())
    named = content.get("weight_map") if isinstance(content, dict) else None
    absent = [n for n in (named or {}).values() if not (index.parent / str(n)).is_file()]
    return f"names {min(absent)}, which is not there: fetch it" if absent else None
