"""Finding a frozen model, pinning its weights, and reading its widths, without loading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from gill_files import hash_of
from pipeline.frozen.backbones import (
    Backbone,
    BackboneError,
    Backbones,
    ChatSettings,
    Dtype,
    Quantization,
    Role,
)
from pipeline.frozen.gguf_files import origin_of
from pipeline.frozen.weight_files import loaded_weights, weights_in
from pipeline.frozen.widths import read_widths

# What decides a model's numbers; documentation, images and duplicate formats do not.
_WEIGHTS: dict[Role, tuple[str, ...]] = {
    "language_model": (".safetensors", ".bin"),
    "visual_encoder": (".safetensors", ".bin", ".pth"),
    "image_generator": (".safetensors", ".bin"),
}
_OTHERS = (".json", ".txt", ".model")
_BESIDE = ("safety_checker", "feature_extractor")
MODEL_FILE = {
    "language_model": "config.json",
    "visual_encoder": "open_clip_config.json",
    "image_generator": "model_index.json",
}
"""What a directory of each role holds for certain."""


def resolve_backbone(
    role: Role,
    source: str,
    *,
    revision: str | None = None,
    allow_download: bool = False,
    dtype: Dtype = "float32",
    quantization: Quantization = "none",
    chat: ChatSettings | None = None,
) -> Backbone:
    """Find a frozen model, pin it and read its widths, without loading its weights.

    `source` is a local directory (of a GGUF file the converted one), a hub id
    (`facebook/opt-6.7b`), or for the visual encoder also an open_clip `ARCHITECTURE:TAG`, whose
    weights are a repository of the hub. A hub id is looked up in the local hub cache first, and
    downloaded only with `allow_download`.

    Raises BackboneError naming the missing file or the missing permission.
    """
    folder, commit = find_backbone(role, source, revision=revision, allow_download=allow_download)
    marker = folder / MODEL_FILE[role]
    if not marker.is_file():
        raise BackboneError(f"{role} {source}: {marker.name} is missing in {folder}")
    path = f"local-dir:{folder}" if role == "visual_encoder" else str(folder)
    return Backbone(
        role=role,
        source=source,
        path=path,
        revision=commit,
        fingerprint=fingerprint_backbone(role, folder, quantization, chat),
        dtype=dtype,
        quantization=quantization,
        gguf=origin_of(folder) if role == "language_model" else None,
        chat=chat,
        widths=read_widths(role, folder),
    )


def find_backbone(
    role: Role, source: str, *, revision: str | None = None, allow_download: bool = False
) -> tuple[Path, str | None]:
    """The directory of a frozen model, and its commit on the hub; see `resolve_backbone`."""
    if Path(source).is_dir():
        return Path(source), None
    repository = _repository_of_tag(source) if role == "visual_encoder" else source
    return _from_hub(repository, revision, allow_download, role)


def fingerprint_backbone(
    role: Role,
    folder: Path,
    quantization: Quantization = "none",
    chat: ChatSettings | None = None,
) -> str:
    """SHA-256 over the files that decide a model's numbers, and how they are quantised; with `chat`
    over its chat template and the settings of that as well."""
    kind = "" if quantization == "none" else f"{quantization}:"
    files = _model_files(role, folder)
    if chat is not None:
        files += [f for f in folder.rglob("*.jinja") if f.is_file()]
    origin = origin_of(folder) if role == "language_model" else None
    content = f"gguf:{origin.sha256}" if origin else fingerprint_files(folder, files)
    if chat is None:
        return kind + content
    settings = json.dumps(chat.model_dump(mode="json"), sort_keys=True)
    return f"{kind}chat:{hashlib.sha256(f'{content} {settings}'.encode()).hexdigest()}"


def resolve_dtype(choice: Literal["auto", "float32", "bfloat16", "float16"], device: str) -> Dtype:
    """What a model computes in on a kind of device (`cpu`, `cuda`).

    `auto` is bfloat16 on a GPU that has it in hardware (Ampere and later), else float32.
    """
    if choice != "auto":
        return choice
    on_gpu = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if on_gpu else "float32"


def fingerprint_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over relative names and contents, in name order."""
    total = hashlib.sha256()
    for file in sorted(files):
        # Names relative to the folder: a model that is moved keeps its fingerprint.
        total.update(f"{file.relative_to(folder).as_posix()} {hash_of(file)}\n".encode())
    return total.hexdigest()


def check_widths(backbones: Backbones) -> None:
    """Refuse a generator whose text side and image side do not fit.

    Raises BackboneError naming both widths, so that a 768/1024 mix-up cannot go unseen.
    """
    widths = backbones.image_generator.widths
    if widths["text_width"] != widths["cross_attention_width"]:
        raise BackboneError(
            f"image_generator {backbones.image_generator.source}: its text encoders give vectors "
            f"of width {widths['text_width']}, but its UNet's cross-attention takes "
            f"{widths['cross_attention_width']}; the directory mixes two models"
        )


def _model_files(role: Role, folder: Path) -> list[Path]:
    """All files that may decide, less those of a format that the loader leaves for a better one."""
    suffixes = (*_WEIGHTS[role], *_OTHERS)
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix in suffixes]
    # A safety checker decides no number that is kept, and may come later than the rest.
    files = [f for f in files if f.relative_to(folder).parts[0] not in _BESIDE]
    if not any(f.suffix in _WEIGHTS[role] for f in files):
        raise BackboneError(f"{role}: no weights (*.safetensors or *.bin) in {folder}")
    better = {
        folder / weights.folder
        for weights in weights_in(role, folder).values()
        if weights.format == "safetensors"
    }
    return [f for f in files if f.suffix not in (".bin", ".pth") or f.parent not in better]


def _from_hub(
    source: str, revision: str | None, allow_download: bool, role: Role
) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = None
    try:
        if allow_download:
            wanted = files_to_fetch(role, HfApi().list_repo_files(source, revision=revision))
        folder = snapshot_download(
            source, revision=revision, local_files_only=not allow_download, allow_patterns=wanted
        )
    except HFValidationError:
        raise BackboneError(f"{source}: neither a directory here nor a hub id") from None
    except LocalEntryNotFoundError as error:
        hint = (
            f"the download failed ({error})"
            if allow_download
            else "set backbones.allow_download: true to fetch it, or name a local directory"
        )
        raise BackboneError(
            f"{source}: no such directory, nor in the hub's cache; {hint}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise BackboneError(f"{source}: the hub refused: {error}") from error
    # The hub's cache names a snapshot's folder by its commit.
    return Path(folder), Path(folder).name


def files_to_fetch(role: Role, names: Sequence[str]) -> list[str]:
    """Those files of a hub repository that the loader reads: one format of the weights, once.

    A generator's repository often holds its weights four times (whole, half, before averaging, in
    one file for other programs): of these only the components' own float32 files are taken.
    """
    kept = [
        name
        for name in names
        if Path(name).suffix in (*_WEIGHTS[role], *_OTHERS, ".jinja")
        and not name.startswith("consolidated")
    ]
    if role == "image_generator":
        skipped = ("image_encoder/", "vae_")
        kept = [
            name
            for name in kept
            if ("/" in name or name == "model_index.json") and not name.startswith(skipped)
        ]
    loaded = loaded_weights(role, kept).values()
    taken = {file for weights in loaded for file in weights.files}
    return [
        name for name in kept if not taken or name in taken or not name.endswith(_WEIGHTS[role])
    ]


def _repository_of_tag(source: str) -> str:
    """The hub repository of an open_clip `ARCHITECTURE:TAG`; anything else as it is."""
    if ":" not in source:
        return source
    from pipeline.frozen.visual_encoder import repository_of_tag

    return repository_of_tag(source)
