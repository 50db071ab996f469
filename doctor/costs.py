"""What every stage costs: rows, gigabytes written, peak memory, hours. For `stages doctor`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import psutil
import torch

from cache import StoreSpec
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
from doctor.throughput import ENCODING_SHARE, TRAINING_SHARE
from doctor.training import CONTEXT_BYTES, predict_training
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


@dataclass(frozen=True)
class _Work:
    """What one stage does, as its cost is reckoned."""

    name: str
    rows: int
    memory: Memory
    dtype: torch.dtype
    written: int
    buffers: int
    """Bytes of main memory besides weights: rows read ahead, shards to be written."""
    units: int
    """How often `memory.flop` is done."""
    share: float
    note: str


def stage_costs(params: Params, models: Models, machine: Machine, rows: Rows) -> list[StageCost]:
    """Every stage that computes, in order; stages whose models are unknown are left out."""
    held_out = params.captions.val_fraction + params.captions.test_fraction
    train_rows = int(rows.number * (1 - held_out))
    works = [
        _features(params, models, machine.device_type, rows.number),
        _targets(params, models, machine.device_type, rows.number),
        _train(params, models, machine.device_type, train_rows),
        _generation(params, models, machine.device_type),
    ]
    costs = [_cost(work, machine) for work in works if work is not None]
    index = index_bytes(params.index, params.model.p, train_rows)
    memory = _held() + 2 * index
    costs.insert(
        sum(cost.name != "evaluate, talk" for cost in costs),
        StageCost("build-index", train_rows, index, None, memory, None, "on the CPU; minutes"),
    )
    return costs


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
    again = 2 * p if settings.rerank else 0
    per_row = {
        "flat": 4 * p,
        # Links of the lowest level are doubled, of 4 bytes each; higher levels hold few vectors.
        "hnsw": 4 * p + 8 * settings.hnsw_links + 16,
        "ivf-sq8": p + 8 + again,
        "ivf-pq": settings.pq_bytes + 8 + again,
    }[settings.kind]
    return rows * (per_row + 60)


def _features(params: Params, models: Models, device: str, rows: int) -> _Work | None:
    encoder = models.visual_encoder
    if encoder is None:
        return None
    memory = features_memory(encoder, params.run.batch_sizes.features, device)
    spec = features_spec(params, encoder.width)
    return _Work(
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


def _targets(params: Params, models: Models, device: str, rows: int) -> _Work | None:
    generator = models.generator
    if generator is None or models.sizes is None:
        return None
    sizes, online = models.sizes, params.targets.source == "online"
    spec = targets_spec(params, sizes.L, sizes.D, sizes.D_pooled)
    return _Work(
        name="precompute-targets",
        rows=rows,
        memory=targets_memory(generator, params.run.batch_sizes.targets, device),
        dtype=generator.unet.dtype,
        written=0 if online else store_bytes(spec, rows),
        buffers=0 if online else _shard_buffers(spec),
        units=0 if online else rows,
        share=ENCODING_SHARE,
        note="online: made while training" if online else "",
    )


def _train(params: Params, models: Models, device: str, rows: int) -> _Work | None:
    language_model, sizes, settings = models.language_model, models.sizes, params.training_settings
    if language_model is None or sizes is None or models.trained is None:
        return None
    held_out = params.batches.validation_rows
    # A quantised model passes through main memory unquantised.
    quantised = weight_bytes(language_model.build().model)
    whole = language_model.parameters * torch.empty((), dtype=language_model.dtype).element_size()
    return _Work(
        name="train",
        rows=rows,
        memory=predict_training(params, models, device, language_model, settings, held_out),
        dtype=language_model.dtype,
        # The heads, the best heads, and the state to resume from with both moments.
        written=5 * 4 * models.trained,
        buffers=3 * settings.batch_size * 4 * sizes.L * sizes.D + max(0, whole - quantised),
        units=settings.steps * settings.batch_size,
        share=TRAINING_SHARE,
        note=f"{settings.steps} steps of {settings.batch_size}",
    )


def _generation(params: Params, models: Models, device: str) -> _Work | None:
    """All models side by side, as for talking; pictures of the generator alone beside GILL's."""
    language_model, generator, encoder = (
        models.language_model,
        models.generator,
        models.visual_encoder,
    )
    if language_model is None or generator is None or encoder is None:
        return None
    memory = generation_memory(generator, params.generation_settings, device)
    frozen = [language_model.build().model, encoder.model, *generator.text_encoders]
    beside = sum(map(weight_bytes, frozen)) + 4 * (models.trained or 0)
    pictures = 2 * params.evaluation.captions
    return _Work(
        name="evaluate, talk",
        rows=pictures,
        memory=replace(memory, weights=memory.weights + beside),
        dtype=generator.unet.dtype,
        written=0,
        buffers=0,
        units=pictures,
        share=TRAINING_SHARE,
        note="pictures of evaluation.captions",
    )


def _cost(work: _Work, machine: Machine) -> StageCost:
    """On a GPU the weights pass through main memory once; on a CPU everything is there."""
    card, memory = machine.card, work.memory
    rate = machine.cpu_rate if card is None else card.rate_of(work.dtype)
    hours = None if rate is None else work.units * memory.flop / (work.share * rate) / 3600
    return StageCost(
        name=work.name,
        rows=work.rows,
        written=work.written,
        device_memory=None if card is None else memory.peak + CONTEXT_BYTES,
        host_memory=_held() + work.buffers + (memory.peak if card is None else memory.weights),
        hours=hours,
        note=work.note,
    )


def _held() -> int:
    """What a process with all libraries loaded holds: this one."""
    return psutil.Process().memory_info().rss


def _shard_buffers(spec: StoreSpec) -> int:
    """A shard as it comes from the encoder, in float32, and as it is written."""
    row = sum(4 * math.prod(a.shape) + a.stored_row_bytes for a in spec.arrays.values())
    return spec.shard_rows * row
