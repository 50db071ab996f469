"""What `stages doctor` can say of the frozen models and the heads, before any weight is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

import torch

from doctor.blueprints import (
    Found,
    GeneratorBlueprint,
    LanguageModelBlueprint,
    count_parameters,
    find,
    generator_blueprint,
    language_model_blueprint,
    visual_encoder_blueprint,
)
from doctor.known_models import ALIASES
from doctor.memory import Memory
from doctor.model_files import check_files, naming
from doctor.throughput import Card
from doctor.weights import check_weights
from miniature.backbones import SHIPPED
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.frozen.backbones import BackboneError, Dtype, Role
from pipeline.frozen.gguf_files import find_gguf, names_gguf
from pipeline.frozen.language_model import check_language_model
from pipeline.frozen.visual_encoder import VisualEncoder
from settings.params import Params


@dataclass(frozen=True)
class FrozenModel:
    """One line of the page."""

    role: Role
    source: str
    revision: str | None
    parameters: int | None
    dtype: Dtype
    quantization: str
    download: float
    """Gigabytes of weights that would be fetched; 0: nothing."""
    says: str


@dataclass
class Models:
    """The models that could be built, on the meta device, and what is wrong with the others."""

    lines: list[FrozenModel] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    language_model: LanguageModelBlueprint | None = None
    visual_encoder: VisualEncoder | None = None
    generator: GeneratorBlueprint | None = None
    sizes: HeadSizes | None = None
    trained: int | None = None
    """Parameters of the heads."""
    _predicted: dict[tuple[object, ...], Memory] = field(default_factory=dict)

    def predicted(self, key: tuple[object, ...], predict: Callable[[], Memory]) -> Memory:
        """What `predict` gives, asked once per key."""
        if key not in self._predicted:
            self._predicted[key] = predict()
        return self._predicted[key]


def outline_models(params: Params, card: Card | None) -> Models:
    """Find and outline every frozen model, then the heads between them."""
    models = Models()
    for role in get_args(Role):
        dtype = _dtype(params, role, card)
        source = getattr(params.backbones, role)
        revision = getattr(params.backbones, f"{role}_revision")
        try:
            with naming(role, source):
                found = find(role, _shipped(role, source), revision)
                foreign = None if source == "miniature" else found.folder
                if foreign is not None and found.place == "local":
                    check_files(role, foreign)
                parameters, stored = _outline(models, params, role, found, getattr(torch, dtype))
                if foreign is not None and found.has_weights:
                    check_weights(role, foreign)
                if role == "language_model" and found.has_weights:
                    checked = found.gguf or (found.folder if params.model.chat else foreign)
                    if checked is not None:
                        check_language_model(checked, params.model.chat)
        except BackboneError as error:
            models.problems += str(error).splitlines()
            parameters, stored, found = None, 0, None
        models.lines.append(_line(models, params, role, found, parameters, stored, dtype))
    _check_dimensions(models, params)
    return models


def _outline(
    models: Models, params: Params, role: Role, found: Found, dtype: torch.dtype
) -> tuple[int, int]:
    """Build one model; its parameters and the bytes of its published weights."""
    if role == "language_model":
        kind = params.backbones.language_model_quantization
        blueprint = language_model_blueprint(found, dtype, kind)
        models.language_model = blueprint
        return blueprint.parameters, blueprint.stored_bytes
    if role == "visual_encoder":
        models.visual_encoder, stored = visual_encoder_blueprint(found, dtype)
        return count_parameters(models.visual_encoder.model), stored
    models.generator = generator = generator_blueprint(found, dtype)
    parts = (generator.unet, generator.vae, *generator.text_encoders)
    return sum(map(count_parameters, parts)), generator.stored_bytes


def _line(
    models: Models,
    params: Params,
    role: Role,
    found: Found | None,
    parameters: int | None,
    stored: int,
    dtype: Dtype,
) -> FrozenModel:
    source = getattr(params.backbones, role)
    download, says = 0.0, "cannot be resolved: see below"
    if source == "miniature":
        says = "shipped with the package"
    elif found is not None and found.gguf is not None:
        says = "local GGUF file"
    elif role == "language_model" and names_gguf(source):
        says = "NOT HERE"
        try:
            find_gguf(source)
        except BackboneError as error:
            models.problems += [str(error)] if str(error) not in models.problems else []
    elif found is not None and found.has_weights:
        says = f"in the {found.place}" if found.place != "local" else "local directory"
    elif found is not None and found.place == "local":
        says = "WEIGHTS MISSING"
        models.problems.append(f"{role} {source}: the directory holds no *.safetensors or *.bin")
    elif found is not None and params.backbones.allow_download:
        download, says = stored / 1e9, "to be downloaded"
    elif found is not None:
        says = "NOT HERE, downloads not allowed"
        models.problems.append(
            f"{role} {source}: no such directory, nor in the hub's cache: set "
            "backbones.allow_download: true, or name a local directory"
        )
    kind = params.backbones.language_model_quantization if role == "language_model" else "none"
    revision = getattr(params.backbones, f"{role}_revision")
    if source in ALIASES and "runwayml" in source:
        models.problems.append(f"{role} {source}: gone from the hub; name {ALIASES[source]}")
    return FrozenModel(role, source, revision, parameters, dtype, kind, download, says)


def _check_dimensions(models: Models, params: Params) -> None:
    """The heads' sizes, by name; what cannot fit together is a problem."""
    language_model, encoder, generator = (
        models.language_model,
        models.visual_encoder,
        models.generator,
    )
    if language_model is None or encoder is None or generator is None:
        return
    if generator.text_width != generator.cross_attention_width:
        models.problems.append(
            f"D: the text encoders of {params.backbones.image_generator} give vectors of width "
            f"{generator.text_width}, its UNet's cross-attention takes "
            f"{generator.cross_attention_width}: the directory mixes two models"
        )
    model, shallow = params.model, language_model.build(1)
    models.sizes = sizes = HeadSizes(
        d=encoder.width,
        e=shallow.width,
        k=model.k,
        r=model.r,
        L=generator.length,
        D=generator.text_width,
        m=model.m,
        p=model.p,
        D_pooled=generator.pooled_width,
        mapper=model.mapper,
        standardizes_states=model.standardizes_states,
    )
    longest = 2 * (params.batches.max_caption_tokens + max(model.k, model.r)) + 1
    if longest > shallow.max_positions:
        models.problems.append(
            f"batches.max_caption_tokens: a packed pair takes up to {longest} positions, "
            f"{params.backbones.language_model} has {shallow.max_positions}"
        )
    try:
        with torch.device("meta"):
            models.trained = count_parameters(Heads(sizes))
    except (ValueError, AssertionError) as error:
        models.problems.append(f"model: {error}")


def _shipped(role: Role, source: str) -> str:
    return str(getattr(SHIPPED, role)) if source == "miniature" else source


def _dtype(params: Params, role: Role, card: Card | None) -> Dtype:
    """As `pipeline.frozen.backbones.resolve_dtype`, for the card that is thought of."""
    choice = getattr(params.backbones, f"{role}_dtype")
    if choice != "auto":
        return choice
    return "bfloat16" if card is not None and card.has_bfloat16 else "float32"
