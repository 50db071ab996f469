"""Published configurations of frozen models, which lie in known_models.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

StoredDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class KnownLanguageModel:
    """A decoder-only model: keyword arguments of its transformers configuration."""

    model_type: str
    sizes: dict[str, Any]
    stored: StoredDtype
    """Dtype of the published files."""


@dataclass(frozen=True)
class KnownGenerator:
    """A latent-diffusion pipeline: keyword arguments of its components' classes."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: list[dict[str, Any]]
    stored: StoredDtype
    length: int
    """L, text positions."""


_KNOWN = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
LANGUAGE_MODELS = {
    name: KnownLanguageModel(sizes.pop("model_type"), stored=sizes.pop("stored"), sizes=sizes)
    for name, sizes in _KNOWN["language_models"].items()
}
HUB_VISUAL_ENCODERS: dict[str, str] = _KNOWN["visual_encoders"]
GENERATORS = {name: KnownGenerator(**parts) for name, parts in _KNOWN["image_generators"].items()}
ALIASES: dict[str, str] = _KNOWN["aliases"]


def known_language_model(source: str) -> KnownLanguageModel | None:
    """What is known of a hub id; None: nothing."""
    return LANGUAGE_MODELS.get(ALIASES.get(source, source))


def known_generator(source: str) -> KnownGenerator | None:
    """What is known of a hub id; None: nothing."""
    return GENERATORS.get(ALIASES.get(source, source))
