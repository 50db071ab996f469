"""Which frozen models are used, pinned: where they lie, their exact revision, widths, fingerprint.

Caches, checkpoints and indexes carry the fingerprints, so that numbers computed with one model
are never mixed with another's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]
Role = Literal["language_model", "visual_encoder", "image_generator"]

# What decides a model's numbers; documentation, images and duplicate formats do not.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")
_MODEL_FILE = {
    "language_model": "config.json",
    "visual_encoder": "open_clip_config.json",
    "image_generator": "model_index.json",
}


class BackboneError(ValueError):
    """A frozen model that cannot be found, loaded or used; the message says what to do."""


class Backbone(BaseModel):
    """One frozen model, pinned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    source: str = Field(
        description="what the parameters named: a directory, hub id or built-in tag"
    )
    path: str = Field(description="what the loader takes")
    revision: str | None = Field(description="the hub's commit; None for local files")
    fingerprint: str = Field(description="SHA-256 over the names and bytes of the model's files")
    dtype: Dtype = Field("float32", description="what the model computes in")
    widths: dict[str, int] = Field(description="sizes read from the model's own configuration")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return getattr(torch, self.dtype)


class Backbones(BaseModel):
    """The three frozen models of one run, as written to the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    language_model: Backbone
    visual_encoder: Backbone
    image_generator: Backbone

    @property
    def fingerprints(self) -> dict[str, str]:
        """Role -> fingerprint, as checkpoints carry them."""
        return {role: getattr(self, role).fingerprint for role in type(self).model_fields}

    @classmethod
    def read(cls, path: str | Path) -> Backbones:
        """Read the manifest. Raises BackboneError when it is absent or not one."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BackboneError(f"{path} is missing: run `stages prepare-backbones`") from None
        except ValueError as error:
            raise BackboneError(f"{path} is not a backbone manifest: {error}") from error

    def write(self, path: str | Path) -> None:
        """Write the manifest as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def resolve_backbone(
    role: Role,
    source: str,
    *,
    revision: str | None = None,
    allow_download: bool = False,
    dtype: Dtype = "float32",
) -> Backbone:
    """Find a frozen model, pin it and read its widths, without loading its weights.

    `source` is a local directory, a hub id (`facebook/opt-6.7b`), or for the visual encoder also an
    open_clip `ARCHITECTURE:TAG`. A hub id is looked up in the local hub cache first, and downloaded
    only with `allow_download`.

    Raises BackboneError naming the missing file or the missing permission.
    """
    if role == "visual_encoder" and not Path(source).is_dir() and ":" in source:
        return _builtin_visual_encoder(source, dtype)
    if Path(source).is_dir():
        folder, commit = Path(source), None
    else:
        folder, commit = _from_hub(source, revision, allow_download)
    marker = folder / _MODEL_FILE[role]
    if not marker.is_file():
        raise BackboneError(f"{role} {source}: {marker.name} is missing in {folder}")
    path = f"local-dir:{folder}" if role == "visual_encoder" else str(folder)
    return Backbone(
        role=role,
        source=source,
        path=path,
        revision=commit,
        fingerprint=fingerprint_files(folder, _model_files(role, folder)),
        dtype=dtype,
        widths=_WIDTHS[role](folder),
    )


def fingerprint_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over relative names and contents, in name order."""
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()} {digest}\n".encode())
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
    if any(f.suffix == ".safetensors" for f in weights):
        files = [f for f in files if f.suffix != ".bin"]
    return files


def _from_hub(source: str, revision: str | None, allow_download: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            source,
            revision=revision,
            local_files_only=not allow_download,
            ignore_patterns=["*.msgpack", "*.h5", "*.ckpt", "*.onnx", "flax_*", "tf_*"],
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
    return Path(folder), Path(folder).name


def _builtin_visual_encoder(source: str, dtype: Dtype) -> Backbone:
    """An open_clip architecture and tag: open_clip pins its own weights by tag."""
    from pipeline.visual_encoder import load_visual_encoder

    width = load_visual_encoder(source).width
    return Backbone(
        role="visual_encoder",
        source=source,
        path=source,
        revision=None,
        fingerprint=hashlib.sha256(source.encode()).hexdigest(),
        dtype=dtype,
        widths={"d": width},
    )


def _language_model_widths(folder: Path) -> dict[str, int]:
    config = _read_json(folder / "config.json")
    hidden = config.get("hidden_size") or config.get("n_embd")
    if hidden is None:
        raise BackboneError(f"{folder}/config.json names no hidden_size")
    return {"e": config.get("word_embed_proj_dim", hidden), "vocabulary": config["vocab_size"]}


def _visual_encoder_widths(folder: Path) -> dict[str, int]:
    config = _read_json(folder / "open_clip_config.json")
    vision = config.get("model_cfg", config)["vision_cfg"]
    return {"d": vision["width"]} if "width" in vision else {}


def _image_generator_widths(folder: Path) -> dict[str, int]:
    index = _read_json(folder / "model_index.json")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in index]
    configs = [_read_json(folder / name / "config.json") for name in encoders]
    tokenizer = _read_json(folder / "tokenizer" / "tokenizer_config.json")
    unet = _read_json(folder / "unet" / "config.json")
    widths = {
        "L": tokenizer["model_max_length"],
        "text_width": sum(config["hidden_size"] for config in configs),
        "cross_attention_width": unet["cross_attention_dim"],
        "picture_size": unet["sample_size"] * _vae_scale(folder),
    }
    if len(configs) == 2:
        widths["pooled_width"] = configs[1]["projection_dim"]
    return widths


def _vae_scale(folder: Path) -> int:
    vae = _read_json(folder / "vae" / "config.json")
    return 2 ** (len(vae["block_out_channels"]) - 1)


def _read_json(path: Path) -> dict:
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
