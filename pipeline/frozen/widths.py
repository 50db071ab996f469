"""The sizes of a frozen model, read from its configuration files, which are other people's.

What a file does not say has the loader's own default; what has none is one line with file and key.
The libraries are imported where sizes are read: who compares pins with files needs none of them.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from pipeline.frozen.backbones import BackboneError, Role

_NO_LIMIT = 10**6
"""A tokenizer's `model_max_length` above this means that it states none."""


def read_widths(role: Role, folder: Path) -> dict[str, int]:
    """Sizes by name: e and vocabulary; d; L, text_width, cross_attention_width, picture_size and,
    where there is one, pooled_width.

    Raises BackboneError: a file or a key that is needed is missing, or not a number.
    """
    return _READERS[role](folder)


def _language_model(folder: Path) -> dict[str, int]:
    path = folder / "config.json"
    written = read_json(path)
    config = _with_defaults(folder).get_text_config() if "model_type" in written else None

    def size(*keys: str) -> int:
        values = [written.get(key, getattr(config, key, None)) for key in keys]
        return _number(path, " or ".join(keys), next((v for v in values if v is not None), None))

    width = size("hidden_size", "n_embd")
    e = written.get("word_embed_proj_dim")
    return {
        "e": width if e is None else size("word_embed_proj_dim"),
        "vocabulary": size("vocab_size"),
    }


def _visual_encoder(folder: Path) -> dict[str, int]:
    config = read_json(folder / "open_clip_config.json")
    vision = (config.get("model_cfg") or config).get("vision_cfg") or {}
    plain = isinstance(vision.get("layers"), int) and not vision.get("attentional_pool")
    if plain and isinstance(vision.get("width"), int) and not vision.get("timm_model_name"):
        return {"d": vision["width"]}
    from pipeline.frozen.visual_encoder import untrained_visual_encoder

    return {"d": untrained_visual_encoder(f"local-dir:{folder}").width}


def _image_generator(folder: Path) -> dict[str, int]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    index = read_json(folder / "model_index.json")

    def has(name: str) -> bool:
        declared = index.get(name)
        return any(declared) if isinstance(declared, list) else bool(declared)

    absent = [n for n in ("unet", "vae", "text_encoder", "tokenizer") if not has(n)]
    if absent:
        raise BackboneError(
            f"image_generator {folder} ({index.get('_class_name')}) has no {', '.join(absent)}: "
            "Stable Diffusion 1.x, 2.x, XL and what is built like them can serve"
        )
    encoders = [n for n in ("text_encoder", "text_encoder_2") if has(n)]
    configs = [_with_defaults(folder / name) for name in encoders]
    unet, vae = folder / "unet/config.json", folder / "vae/config.json"
    side = _default(unet, UNet2DConditionModel, "sample_size")
    cross = _default(unet, UNet2DConditionModel, "cross_attention_dim")
    channels = _default(vae, AutoencoderKL, "block_out_channels")
    widths = {
        "L": text_length(folder),
        "text_width": sum(
            _number(folder / name / "config.json", "hidden_size", config.hidden_size)
            for name, config in zip(encoders, configs)
        ),
        "cross_attention_width": _number(unet, "cross_attention_dim", _first(cross)),
        "picture_size": _number(unet, "sample_size", _first(side)) * 2 ** (len(channels) - 1),
    }
    if len(configs) == 2:
        path = folder / "text_encoder_2/config.json"
        widths["pooled_width"] = _number(path, "projection_dim", configs[1].projection_dim)
    return widths


def text_length(folder: Path) -> int:
    """L of a pipeline: what its tokenizer states, at most the positions of its text encoder.

    Raises BackboneError: neither of them states it.
    """
    path = folder / "tokenizer/tokenizer_config.json"
    stated = read_json(path).get("model_max_length")
    positions = getattr(_with_defaults(folder / "text_encoder"), "max_position_embeddings", None)
    limits = [n for n in (stated, positions) if isinstance(n, (int, float)) and 0 < n < _NO_LIMIT]
    return _number(path, "model_max_length", min(limits, default=None))


def _with_defaults(folder: Path) -> Any:
    """A configuration of transformers, with what its file leaves out."""
    from transformers import AutoConfig

    read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{folder}/config.json: {str(error).splitlines()[0]}") from error
    except Exception as error:  # strict data classes of huggingface_hub raise kinds of their own
        raise BackboneError(f"{folder}/config.json: {' '.join(str(error).split())}") from error


def _default(path: Path, kind: type, key: str) -> Any:
    """A key of diffusers' configuration: as written, else its class's default."""
    value = read_json(path).get(key)
    return inspect.signature(kind).parameters[key].default if value is None else value


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _number(path: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
        said = "is missing or null" if value is None else f"is {value!r}, no size"
        raise BackboneError(f"{path}: {key} {said}, and has no default: write it there")
    return int(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises BackboneError: missing, broken, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BackboneError(f"{path} is missing") from None
    except ValueError as error:
        raise BackboneError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path} holds no object {{...}}")
    return content


_READERS = {
    "language_model": _language_model,
    "visual_encoder": _visual_encoder,
    "image_generator": _image_generator,
}
