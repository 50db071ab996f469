"""Finding a frozen model, pinning its weights, and reading its widths, without loading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from gill_files import hash_of
from pipeline.frozen.backbones import Backbone, BackboneError, Backbones, Dtype, Quantization, Role

# What decides a model's numbers; documentation, images and duplicate formats do not.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")
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
) -> Backbone:
    """Find a frozen model, pin it and read its widths, without loading its weights.

    `source` is a local directory, a hub id (`facebook/opt-6.7b`), or for the visual encoder also an
    open_clip `ARCHITECTURE:TAG`, whose weights are a repository of the hub. A hub id is looked up
    in the local hub cache first, and downloaded only with `allow_download`.

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
        fingerprint=fingerprint_backbone(role, folder, quantization),
        dtype=dtype,
        quantization=quantization,
        widths=_WIDTHS[role](folder),
    )


def find_backbone(
    role: Role, source: str, *, revision: str | None = None, allow_download: bool = False
) -> tuple[Path, str | None]:
    """The directory of a frozen model, and its commit on the hub; see `resolve_backbone`."""
    if Path(source).is_dir():
        return Path(source), None
    repository = _repository_of_tag(source) if role == "visual_encoder" else source
    return _from_hub(repository, revision, allow_download, role)


def fingerprint_backbone(role: Role, folder: Path, quantization: Quantization = "none") -> str:
    """SHA-256 over the files that decide a model's numbers, and how they are quantised."""
    kind = "" if quantization == "none" else f"{quantization}:"
    return kind + fingerprint_files(folder, _model_files(role, folder))


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
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix in _WEIGHT_SUFFIXES]
    weights = [f for f in files if f.suffix in (".safetensors", ".bin")]
    if not weights:
        raise BackboneError(f"{role}: no weights (*.safetensors or *.bin) in {folder}")
    # Where both lie, the loaders read safetensors alone.
    if any(f.suffix == ".safetensors" for f in weights):
        files = [f for f in files if f.suffix != ".bin"]
    return files


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
        if Path(name).suffix in (*_WEIGHT_SUFFIXES, ".jinja")
        and not name.startswith("consolidated")
    ]
    if role == "image_generator":
        skipped = ("safety_checker/", "feature_extractor/", "image_encoder/", "vae_")
        kept = [
            name
            for name in kept
            if ("/" in name or name == "model_index.json") and not name.startswith(skipped)
        ]
    plain = [name for name in kept if ".fp16." not in name and ".non_ema." not in name]
    folders = {Path(name).parent for name in plain if name.endswith(".safetensors")}
    return [name for name in plain if not (name.endswith(".bin") and Path(name).parent in folders)]


def _repository_of_tag(source: str) -> str:
    """The hub repository of an open_clip `ARCHITECTURE:TAG`; anything else as it is."""
    if ":" not in source:
        return source
    from pipeline.frozen.visual_encoder import repository_of_tag

    return repository_of_tag(source)


def _language_model_widths(folder: Path) -> dict[str, int]:
    config = read_json(folder / "config.json")
    hidden = config.get("hidden_size") or config.get("n_embd")
    if hidden is None:
        raise BackboneError(f"{folder}/config.json names no hidden_size")
    # OPT-350m: its rows are narrower than its hidden states, and e is the width of the rows.
    return {"e": config.get("word_embed_proj_dim", hidden), "vocabulary": config["vocab_size"]}


def _visual_encoder_widths(folder: Path) -> dict[str, int]:
    config = read_json(folder / "open_clip_config.json")
    vision = config.get("model_cfg", config).get("vision_cfg", {})
    # A plain ViT pools at its layers' width. Others are built without weights and tried.
    plain = isinstance(vision.get("layers"), int) and not vision.get("attentional_pool")
    if plain and "width" in vision and not vision.get("timm_model_name"):
        return {"d": vision["width"]}
    from pipeline.frozen.visual_encoder import untrained_visual_encoder

    return {"d": untrained_visual_encoder(f"local-dir:{folder}").width}


def _image_generator_widths(folder: Path) -> dict[str, int]:
    index = read_json(folder / "model_index.json")
    absent = [n for n in ("unet", "vae", "text_encoder", "tokenizer") if not any(index.get(n, []))]
    if absent:
        raise BackboneError(
            f"image_generator {folder} ({index.get('_class_name')}) has no {', '.join(absent)}: "
            "Stable Diffusion 1.x, 2.x, XL and what is built like them can serve"
        )
    encoders = [n for n in ("text_encoder", "text_encoder_2") if any(index.get(n, []))]
    configs = [read_json(folder / name / "config.json") for name in encoders]
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json")
    unet = read_json(folder / "unet" / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    size = unet["sample_size"]
    side = size if isinstance(size, int) else size[0]
    widths = {
        "L": tokenizer["model_max_length"],
        # XL joins the vectors of its two encoders, position by position.
        "text_width": sum(config["hidden_size"] for config in configs),
        "cross_attention_width": unet["cross_attention_dim"],
        # Each level but the last halves the side: latents of 64 are pictures of 512.
        "picture_size": side * 2 ** (len(vae["block_out_channels"]) - 1),
    }
    # XL's pooled vector is the second encoder's, projected.
    if len(configs) == 2:
        widths["pooled_width"] = configs[1]["projection_dim"]
    return widths


def read_json(path: Path) -> dict:
    """A configuration; raises BackboneError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BackboneError(f"{path} is missing") from None
    except json.JSONDecodeError as error:
        raise BackboneError(f"{path} is not JSON: {error}") from error


_WIDTHS = {
    "language_model": _language_model_widths,
    "visual_encoder": _visual_encoder_widths,
    "image_generator": _image_generator_widths,
}
