"""What every stage costs: rows, gigabytes written, peak memory, hours. For `stages doctor`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import psutil
import torch

from cache import StoreSpec
from doctor.chat_streams import answering_memory, num_replies
from doctor.denoising import latents_memory
from doctor.document_streams import PICTURES
from doctor.machine import Machine
from doctor.memory import (
    Memory,
    features_memory,
    generation_memory,
    targets_memory,
    weight_bytes,
)
from doctor.models import Models
from doctor.rows import Rows
from doctor.throughput import ANSWERING_SHARE, ENCODING_SHARE, TRAINING_SHARE
from doctor.training import CONTEXT_BYTES, predict_training
from gill.latent_specs import latents_spec
from gill.store_specs import features_spec, targets_spec
from pipeline.settings import IndexSettings
from settings.params import Params


@dataclass(frozen=True)
class StageCost:
    """One stage; None where the device's speed is unknown or nothing is to be said."""

    name: str
    rows: int
    written: int
    device_memory: int | None
    host_memory: int
    hours: float | None
    note: str = ""


def stage_costs(params: Params, models: Models, machine: Machine, rows: Rows) -> list[StageCost]:
    """Every stage that computes, in order; stages whose models are unknown are left out."""
    # Training and the index see this split alone; features and targets are made for all.
    held_out = params.captions.val_fraction + params.captions.test_fraction
    train_rows = int(rows.number * (1 - held_out))
    costs = (
        _features(params, models, machine, rows.number),
        _targets(params, models, machine, rows.number),
        _latents(params, models, machine, rows.number),
        _replies(params, models, machine),
        _train(params, models, machine, train_rows),
        _index(params, train_rows),
        _generation(params, models, machine),
    )
    return [cost for cost in costs if cost is not None]


def store_checks(params: Params, models: Models, rows: Rows) -> list[str]:
    """Stores that `fill` would refuse, in its own words."""
    specs = {}
    if models.visual_encoder is not None:
        specs["features"] = features_spec(params, models.visual_encoder.width)
    if models.sizes is not None and params.targets.source == "cache":
        sizes = models.sizes
        specs["targets"] = targets_spec(params, sizes.L, sizes.D, sizes.D_pooled)
    found = []
    for name, spec in specs.items():
        try:
            spec.check_num_files(rows.number)
        except ValueError as error:
            found.append(f"{name}.shard_rows: {error}")
    return found


def store_bytes(spec: StoreSpec, rows: int) -> int:
    """A full store, before any compressor: values, and key, checksum, error and status per row."""
    values = sum(array.stored_row_bytes for array in spec.arrays.values())
    return rows * (values + 8 + 8 * len(spec.arrays) + 1)


def index_bytes(settings: IndexSettings, p: int, rows: int) -> int:
    """Vectors or codes with their ids and links, and 60 bytes of path and caption per picture."""
    # float16 copies beside the codes, by which candidates are ranked once more.
    again = 2 * p if settings.rerank else 0
    per_row = {
        "flat": 4 * p,
        # Links of the lowest level are doubled, of 4 bytes each; higher levels hold few vectors.
        "hnsw": 4 * p + 8 * settings.hnsw_links + 16,
        "ivf-sq8": p + 8 + again,
        "ivf-pq": settings.pq_bytes + 8 + again,
    }[settings.kind]
    return rows * (per_row + 60)


def _features(params: Params, models: Models, machine: Machine, rows: int) -> StageCost | None:
    encoder = models.visual_encoder
    if encoder is None:
        return None
    memory = features_memory(encoder, params.run.batch_sizes.features, machine.device_type)
    spec = features_spec(params, encoder.width)
    return _cost(
        machine,
        name="precompute-features",
        rows=rows,
        memory=memory,
        dtype=encoder.dtype,
        written=store_bytes(spec, rows),
        buffers=_shard_buffers(spec) + 2 * memory.data,
        units=rows,
        share=ENCODING_SHARE,
        note="reading pictures not counted",
    )


def _targets(params: Params, models: Models, machine: Machine, rows: int) -> StageCost | None:
    generator, sizes = models.generator, models.sizes
    if generator is None or sizes is None:
        return None
    online = params.targets.source == "online"
    captions = params.training.steps * params.training.batch_size
    stored = params.targets.model_copy(update={"source": "cache"})
    spec = targets_spec(
        params.model_copy(update={"targets": stored}), sizes.L, sizes.D, sizes.D_pooled
    )
    return _cost(
        machine,
        name="precompute-targets",
        rows=rows,
        memory=targets_memory(generator, params.run.batch_sizes.targets, machine.device_type),
        dtype=generator.unet.dtype,
        written=0 if online else store_bytes(spec, rows),
        buffers=0 if online else _shard_buffers(spec),
        units=captions if online else rows,
        share=ENCODING_SHARE,
        note=f"while training; `cache`: {store_bytes(spec, rows) / 1e9:.0f} GB"
        if online
        else f"`online`: {captions / rows:.1f} times the hours, 0 GB",
    )


def _latents(params: Params, models: Models, machine: Machine, rows: int) -> StageCost | None:
    generator = models.generator
    if generator is None or not params.objective.diffusion_weight:
        return None
    memory = latents_memory(generator, params.run.batch_sizes.pictures, machine.device_type)
    size, channels = generator.latent_size, int(generator.vae.config.latent_channels)
    spec = latents_spec(params, (2, channels, size, size))
    return _cost(
        machine,
        name="precompute-latents",
        rows=rows,
        memory=memory,
        dtype=torch.float16,  # float32 numbers, multiplied in TF32: nearer to this rate
        written=store_bytes(spec, rows),
        buffers=_shard_buffers(spec) + 2 * memory.data,
        units=rows,
        share=ENCODING_SHARE,
        note="reading pictures not counted",
    )


def _replies(params: Params, models: Models, machine: Machine) -> StageCost | None:
    language_model, answer = models.language_model, params.training.replies.max_tokens
    if language_model is None or not params.needs_replies:
        return None
    count = num_replies(params)
    cost = _cost(
        machine,
        name="precompute-replies",
        rows=count,
        memory=answering_memory(language_model, answer),
        dtype=language_model.dtype,
        units=count,
        share=ANSWERING_SHARE,
        note=f"at most {answer} tokens each",
    )
    if cost.hours and count:
        cost = replace(cost, note=f"{cost.note}, {3600 * cost.hours / count:.2g} s")
    return cost


def _train(params: Params, models: Models, machine: Machine, rows: int) -> StageCost | None:
    language_model, sizes, settings = models.language_model, models.sizes, params.training_settings
    if language_model is None or sizes is None or models.trained is None:
        return None
    if chosen := params.training.language_model_dtype:
        language_model = replace(language_model, dtype=getattr(torch, chosen))
    held_out, device = params.batches.validation_rows, machine.device_type
    documents = params.training.shares.get("documents", 0)
    # A quantised model passes through main memory unquantised.
    quantised = weight_bytes(language_model.build().model)
    whole = language_model.parameters * language_model.dtype.itemsize
    return _cost(
        machine,
        name="train",
        rows=rows,
        memory=predict_training(params, models, device, language_model, settings, held_out),
        dtype=language_model.dtype,
        # The heads, the best heads, and the state to resume from with both moments.
        written=5 * 4 * models.trained,
        buffers=3 * settings.batch_size * 4 * sizes.L * sizes.D + max(0, whole - quantised),
        units=settings.steps * settings.batch_size,
        share=TRAINING_SHARE,
        note=f"{settings.steps} steps of {settings.batch_size}"
        + f", {documents} of them documents of {PICTURES} texts and pictures" * (documents > 0),
    )


def _index(params: Params, rows: int) -> StageCost:
    written = index_bytes(params.index, params.model.p, rows)
    memory = _held() + 2 * written
    return StageCost("build-index", rows, written, None, memory, None, "on the CPU; minutes")


def _generation(params: Params, models: Models, machine: Machine) -> StageCost | None:
    """All models side by side, as for talking; pictures of the generator alone beside GILL's."""
    language_model, generator = models.language_model, models.generator
    if language_model is None or generator is None or models.visual_encoder is None:
        return None
    memory = generation_memory(generator, params.generation_settings, machine.device_type)
    frozen = [language_model.build().model, models.visual_encoder.model, *generator.text_encoders]
    # Nothing is unloaded between turns: the other models stay beside the generator.
    beside = sum(map(weight_bytes, frozen)) + 4 * (models.trained or 0)
    pictures = 2 * params.evaluation.captions
    return _cost(
        machine,
        name="evaluate, talk",
        rows=pictures,
        memory=replace(memory, weights=memory.weights + beside),
        dtype=generator.unet.dtype,
        units=pictures,
        share=TRAINING_SHARE,
        note="pictures of evaluation.captions",
    )


def table_8_advice(params: Params, models: Models, machine: Machine) -> list[str]:
    """What the pictures of Table 8 take where that is more than an hour, and what fits in one."""
    section, generator = params.evaluation, models.generator
    rate = None if generator is None else machine.rate_of(generator.unet.dtype)
    captions = section.coco_2014.limit
    chosen = "table_8" in params.evaluation_tables
    if not chosen or generator is None or rate is None or captions is None:
        return []
    settings, few = section.settings_for("table_8", params.generation_settings), 25
    pictures = captions * len(section.methods)

    def hours(steps: int) -> float:
        reduced = settings.model_copy(update={"steps": steps})
        flop = generation_memory(generator, reduced, machine.device_type).flop
        return pictures * flop / (TRAINING_SHARE * rate) / 3600

    asked, fewer = hours(settings.steps), hours(min(few, settings.steps))
    if asked <= 1:
        return []
    sizes = [f"evaluation.coco_2014.limit: {max(1, int(captions / asked))}"]
    if settings.steps > few:
        sizes.append(
            f"evaluation.generation.table_8.steps: {few}"
            + (f" with limit: {max(1, int(captions / fewer))}" if fewer > 1 else "")
        )
    return [
        f"Table 8 as written, {pictures:,} pictures of {settings.steps} steps, takes {asked:.0f} "
        "hours with run.convolutions: compiled, up to twice as long without; one hour is enough "
        f"for {' or '.join(sizes)} (FID of fewer pictures is higher: compare at one size)"
    ]


def _cost(
    machine: Machine,
    *,
    name: str,
    rows: int,
    memory: Memory,
    dtype: torch.dtype,
    units: int,
    share: float,
    note: str,
    written: int = 0,
    buffers: int = 0,
) -> StageCost:
    """On a GPU the weights pass through main memory once; on a CPU everything is there.

    Args:
        units: how often `memory.flop` is done.
        buffers: bytes of main memory besides weights: rows read ahead, shards to be written.
    """
    card = machine.card
    # Operations a second at best; `share` is how much of that such work comes to.
    rate = machine.rate_of(dtype)
    return StageCost(
        name=name,
        rows=rows,
        written=written,
        device_memory=None if card is None else memory.peak + CONTEXT_BYTES,
        host_memory=_held() + buffers + (memory.peak if card is None else memory.weights),
        hours=None if rate is None else units * memory.flop / (share * rate) / 3600,
        note=note,
    )


def _held() -> int:
    """What a process with all libraries loaded holds: this one."""
    return psutil.Process().memory_info().rss


def _shard_buffers(spec: StoreSpec) -> int:
    """A shard as it comes from the encoder, in float32, and as it is written."""
    row = sum(4 * math.prod(a.shape) + a.stored_row_bytes for a in spec.arrays.values())
    return spec.shard_rows * row
