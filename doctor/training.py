"""Memory of the train stage, as set and with what saves memory. For `stages doctor`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from doctor.blueprints import LanguageModelBlueprint
from doctor.chat_streams import chat_step, chat_validation
from doctor.denoising import denoising_memory, with_denoising, without_denoising
from doctor.document_streams import mixed_step
from doctor.memory import Memory, targets_memory, training_memory, validation_memory
from doctor.models import Models
from pipeline.frozen.backbones import Quantization
from pipeline.settings import TrainingSettings
from settings.params import Params

CAPTION_TOKENS = (5, 8, 9, 10, 11, 12, 14, 19)
"""Lengths of captions, 11 on average, as of Conceptual Captions; cut at `max_caption_tokens`."""
CONTEXT_BYTES = 600_000_000
"""What a GPU's driver and libraries take beside torch's tensors."""


@dataclass(frozen=True)
class Variant:
    """Training with other settings, and the device memory that it takes."""

    says: str
    changes: dict[str, object]
    device_memory: int


def training_variants(params: Params, models: Models) -> list[Variant]:
    """Device memory of training on one GPU, as set and with what saves memory."""
    if models.language_model is None or models.sizes is None or models.trained is None:
        return []
    settings, kind = params.training_settings, params.backbones.language_model_quantization
    rows, recompute = params.batches.validation_rows, settings.recompute_activations
    part = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    smaller = [size for size in (50, 24) if size < part]
    small, few = (smaller or [part])[-1], min(rows, 100)
    tried: list[tuple[Quantization, int, bool, int]] = [(kind, part, recompute, rows)]
    # The whole batch first: it keeps the GPU busier than small parts do, and loses no precision.
    tried += [(kind, part, True, rows), (kind, part, True, few)]
    tried += [(kind, size, recompute, rows) for size in smaller]
    if kind == "none":
        tried += [("int8", small, recompute, few), ("nf4", small, recompute, few)]
    tried += [(kind if kind != "none" else "nf4", min(part, 8), True, few)]
    plain = dict(zip(_KEYS, tried[0]))
    found = []
    for values in dict.fromkeys(tried):
        changes: dict[str, object] = {
            key: value for key, value in zip(_KEYS, values) if value != plain[key]
        }
        quantization, size, recomputed, held_out = values
        memory = predict_training(
            params,
            models,
            "cuda",
            replace(models.language_model, quantization=quantization),
            settings.model_copy(
                update={"micro_batch_size": size, "recompute_activations": recomputed}
            ),
            held_out,
        )
        found.append(Variant(_spell(changes), changes, memory.peak + CONTEXT_BYTES))
    return found


_KEYS = (
    "backbones.language_model_quantization",
    "run.micro_batch_size",
    "run.recompute_activations",
    "batches.validation_rows",
)


def predict_training(
    params: Params,
    models: Models,
    device_type: str,
    blueprint: LanguageModelBlueprint,
    settings: TrainingSettings,
    validation_rows: int,
) -> Memory:
    """A step, validation, and the text encoders where they encode captions meanwhile."""
    assert models.sizes is not None
    assert models.generator is not None
    longest = params.batches.max_caption_tokens
    of_all: dict[str, Any] = {
        "caption_tokens": [min(length, longest) for length in CAPTION_TOKENS],
        "device_type": device_type,
    }
    parts = (settings.micro_batch_size, settings.recompute_activations)
    sizes, objective = models.sizes, without_denoising(params.objective)
    turns = held_out = None
    if params.model.turns == "chat":
        answer = params.training.replies.max_tokens
        turns, held_out = (
            partial(chat_step, shares=params.stream_shares, answer=answer),
            chat_validation,
        )
    elif params.training.shares.get("documents"):
        positions = blueprint.config.get_text_config().max_position_embeddings
        turns = partial(
            mixed_step,
            shares=params.training.shares,
            sizes=sizes,
            room=min(positions, params.batches.max_document_tokens or positions) - 1,
        )

    def step() -> Memory:
        return training_memory(blueprint, sizes, objective, settings, turns=turns, **of_all)

    def validation() -> Memory:
        return validation_memory(
            blueprint, sizes, objective, rows=validation_rows, turns=held_out, **of_all
        )

    of_model = (blueprint.quantization, device_type)
    memory = models.predicted(("step", *of_model, *parts), step)
    if validation_rows:
        key = ("validation", *of_model, validation_rows)
        memory = memory.with_validation(models.predicted(key, validation))
    if params.objective.diffusion_weight:
        memory = _with_unet(memory, models, device_type, settings, validation_rows)
    if params.targets.source == "online":
        captions = max(settings.batch_size, validation_rows)
        encoders = targets_memory(models.generator, captions, device_type)
        memory = replace(
            memory,
            weights=memory.weights + encoders.weights,
            working=max(memory.working, encoders.working),
            flop=memory.flop + encoders.flop,
        )
    return memory


def _with_unet(
    memory: Memory,
    models: Models,
    device_type: str,
    settings: TrainingSettings,
    validation_rows: int,
) -> Memory:
    generator, recompute = models.generator, settings.recompute_activations
    assert generator is not None
    added = models.predicted(
        ("denoising", device_type, recompute),
        lambda: denoising_memory(generator, device_type, recompute=recompute),
    )
    # Held-out rows go through in parts no larger than those of a step, and without a gradient.
    rows = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    return with_denoising(memory, added, rows, settings.batch_size + validation_rows)


def _spell(changes: dict[str, object]) -> str:
    """`run.micro_batch_size: 24` as `micro_batch_size 24`."""
    if not changes:
        return "as set"
    short = {"language_model_quantization": "language model", "recompute_activations": "recompute"}
    parts = []
    for key, value in changes.items():
        name = key.split(".")[1]
        name = short.get(name, name)
        parts.append(name if value is True else f"{name} {value}")
    return ", ".join(parts)
