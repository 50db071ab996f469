"""What every stage costs: rows, gigabytes written, peak memory, hours. For `stages doctor`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from cache import ArraySpec, StoreSpec
from pipeline.backbones import Quantization
from pipeline.blueprints import LanguageModelBlueprint
from pipeline.memory import (
    Memory,
    features_memory,
    generation_memory,
    targets_memory,
    training_memory,
    validation_memory,
    weight_bytes,
)
from pipeline.settings import IndexSettings, TrainingSettings
from pipeline.throughput import ENCODING_SHARE, TRAINING_SHARE
from stages.doctor_machine import Machine
from stages.doctor_models import Models
from stages.params import Params
from stages.paths import ARTIFACTS

CAPTION_TOKENS = (5, 8, 9, 10, 11, 12, 14, 19)
"""Lengths of captions, 11 on average, as of Conceptual Captions; cut at `max_caption_tokens`."""
PAPER_ROWS = 3_300_000
CONTEXT_BYTES = 600_000_000
"""What a GPU's driver and libraries take beside torch's tensors."""


@dataclass(frozen=True)
class Rows:
    """How many rows there are, and how that is known."""

    number: int
    known_from: str


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
class Variant:
    """Training with other settings, and the device memory that it takes."""

    says: str
    changes: dict[str, object]
    device_memory: int


def count_rows(params: Params, given: int | None) -> Rows:
    """From --rows, from the checked table, from the table itself, else the paper's number."""
    if given is not None:
        return Rows(given, "--rows")
    table = params.captions.table
    report = ARTIFACTS.captions.with_name("captions.report.json")
    if ARTIFACTS.captions.exists() and report.exists():
        source = json.loads(report.read_text(encoding="utf-8"))["source"]
        if source == table or (table == "miniature" and "miniature" in Path(source).parts):
            return Rows(pq.read_metadata(ARTIFACTS.captions).num_rows, str(ARTIFACTS.captions))
    if table == "miniature":
        drawn = params.captions.miniature
        pictures = drawn.pictures + 2 * drawn.held_out_pictures
        return Rows(pictures * drawn.captions_per_picture, "captions.miniature")
    path = Path(table)
    if path.suffix in (".parquet", ".pq") and path.is_file():
        return Rows(pq.read_metadata(path).num_rows, table)
    if path.is_file() and path.suffix != ".tar":
        with path.open("rb") as file:
            return Rows(max(0, sum(1 for _ in file) - 1), table)
    counted = sum(_img2dataset_rows(path)) if path.is_dir() else 0
    if counted:
        return Rows(counted, f"the *_stats.json of {table}")
    return Rows(PAPER_ROWS, f"assumed: CC3M as in the paper, as {table} is not here; --rows N")


def stage_costs(params: Params, models: Models, machine: Machine, rows: Rows) -> list[StageCost]:
    """Every stage that computes, in order; stages whose models are unknown are left out."""
    return [cost for cost in _costs(params, models, machine, rows.number) if cost is not None]


def training_variants(params: Params, models: Models) -> list[Variant]:
    """Device memory of training on one GPU, as set and with what saves memory."""
    if models.language_model is None or models.sizes is None or models.trained is None:
        return []
    settings, kind = params.training, params.backbones.language_model_quantization
    rows, recompute = params.batches.validation_rows, settings.recompute_activations
    part = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    smaller = [size for size in (50, 24) if size < part]
    small, few = (smaller or [part])[-1], min(rows, 100)
    tried: list[tuple[Quantization, int, bool, int]] = [(kind, part, recompute, rows)]
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
        memory = _training(
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
    "training.micro_batch_size",
    "training.recompute_activations",
    "batches.validation_rows",
)


def store_checks(params: Params, models: Models, rows: Rows) -> list[str]:
    """Stores that `fill` would refuse, in its own words."""
    specs = {}
    if models.visual_encoder is not None:
        specs["features"] = features_spec(params, models.visual_encoder.width)
    if models.sizes is not None and params.targets.source == "cache":
        specs["targets"] = targets_spec(params, models)
    found = []
    for name, spec in specs.items():
        try:
            spec.check_num_files(rows.number)
        except ValueError as error:
            found.append(f"{name}.shard_rows: {error}")
    return found


def features_spec(params: Params, d: int) -> StoreSpec:
    """The store that precompute-features fills."""
    array = ArraySpec(dims={"visual": d}, codec=params.features.codec)
    return StoreSpec(arrays={"pooled": array}, shard_rows=params.features.shard_rows)


def targets_spec(params: Params, models: Models) -> StoreSpec:
    """The store that precompute-targets fills."""
    assert models.sizes is not None
    dims = {"position": models.sizes.L, "channel": models.sizes.D}
    arrays = {"embedding": ArraySpec(dims=dims, codec=params.targets.codec)}
    if models.sizes.D_pooled is not None:
        arrays["pooled"] = ArraySpec(dims={"pooled_channel": models.sizes.D_pooled})
    return StoreSpec(arrays=arrays, shard_rows=params.targets.shard_rows)


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


def _costs(
    params: Params, models: Models, machine: Machine, rows: int
) -> Iterator[StageCost | None]:
    sizes, generator, encoder = models.sizes, models.generator, models.visual_encoder
    device, base = machine.device_type, psutil.Process().memory_info().rss
    train_rows = int(rows * (1 - params.captions.val_fraction - params.captions.test_fraction))
    if encoder is not None:
        memory = features_memory(encoder, params.features.batch_size, device)
        spec = features_spec(params, encoder.width)
        yield _stage(
            "precompute-features",
            rows,
            memory,
            machine,
            base,
            written=store_bytes(spec, rows),
            buffers=_shard_buffers(spec) + 2 * memory.data,
            work=rows,
            share=ENCODING_SHARE,
            note="reading pictures not counted",
        )
    if generator is not None and sizes is not None:
        memory = targets_memory(generator, params.targets.batch_size, device)
        spec, online = targets_spec(params, models), params.targets.source == "online"
        yield _stage(
            "precompute-targets",
            rows,
            memory,
            machine,
            base,
            written=0 if online else store_bytes(spec, rows),
            buffers=_shard_buffers(spec),
            work=0 if online else rows,
            share=ENCODING_SHARE,
            note="online: none stored" if online else "",
        )
    if models.language_model is not None and sizes is not None and models.trained is not None:
        memory = _training(
            params,
            models,
            device,
            models.language_model,
            params.training,
            params.batches.validation_rows,
        )
        settings = params.training
        # The heads, the best heads, and the state to resume from with both moments.
        yield _stage(
            "train",
            train_rows,
            memory,
            machine,
            base,
            written=5 * 4 * models.trained,
            buffers=3 * settings.batch_size * 4 * sizes.L * sizes.D,
            work=settings.steps * settings.batch_size,
            share=TRAINING_SHARE,
            note=f"{settings.steps} steps of {settings.batch_size}",
        )
    if sizes is not None:
        index = index_bytes(params.index, params.model.p, train_rows)
        yield StageCost(
            "build-index", train_rows, index, None, base + 2 * index, None, "on the CPU; minutes"
        )
    if generator is not None and models.language_model is not None and encoder is not None:
        memory = generation_memory(generator, params.generation, device)
        beside = weight_bytes(models.language_model.build().model) + weight_bytes(encoder.model)
        beside += sum(map(weight_bytes, generator.text_encoders)) + 4 * (models.trained or 0)
        memory = replace(memory, weights=memory.weights + beside)
        # With the pictures of the generator alone beside GILL's.
        pictures = 2 * params.evaluation.captions
        yield _stage(
            "evaluate, talk",
            pictures,
            memory,
            machine,
            base,
            written=0,
            buffers=0,
            work=pictures,
            share=TRAINING_SHARE,
            note="pictures of evaluation.captions",
        )


def _stage(
    name: str,
    rows: int,
    memory: Memory,
    machine: Machine,
    base: int,
    *,
    written: int,
    buffers: int,
    work: int,
    share: float,
    note: str,
) -> StageCost:
    """On a GPU the weights pass through main memory once; on a CPU everything is there."""
    on_card = machine.card is not None
    rate = machine.card.rate if machine.card is not None else machine.cpu_rate
    hours = None if rate is None else work * memory.flop / (share * rate) / 3600
    return StageCost(
        name=name,
        rows=rows,
        written=written,
        device_memory=memory.peak + CONTEXT_BYTES if on_card else None,
        host_memory=base + buffers + (memory.weights if on_card else memory.peak),
        hours=hours,
        note=note,
    )


def _training(
    params: Params,
    models: Models,
    device_type: str,
    blueprint: LanguageModelBlueprint,
    settings: TrainingSettings,
    validation_rows: int,
) -> Memory:
    """A step, and validation, which is alike for all variants of one language model."""
    assert models.sizes is not None
    longest = params.batches.max_caption_tokens
    tokens = [min(length, longest) for length in CAPTION_TOKENS]
    memory = training_memory(
        blueprint,
        models.sizes,
        params.objective,
        settings,
        caption_tokens=tokens,
        device_type=device_type,
    )
    if not validation_rows:
        return memory
    key = (blueprint.quantization, validation_rows, device_type)
    if key not in models.validation:
        models.validation[key] = validation_memory(
            blueprint,
            models.sizes,
            params.objective,
            caption_tokens=tokens,
            rows=validation_rows,
            device_type=device_type,
        )
    return memory.with_validation(models.validation[key])


def _shard_buffers(spec: StoreSpec) -> int:
    """A shard as it comes from the encoder, in float32, and as it is written."""
    row = sum(4 * math.prod(a.shape) + a.stored_row_bytes for a in spec.arrays.values())
    return spec.shard_rows * row


def _img2dataset_rows(folder: Path) -> Iterator[int]:
    for file in sorted(folder.glob("*_stats.json")):
        yield int(json.loads(file.read_text(encoding="utf-8")).get("successes", 0))


def _spell(changes: dict[str, object]) -> str:
    """`training.micro_batch_size: 24` as `micro_batch_size 24`."""
    if not changes:
        return "as set"
    short = {"language_model_quantization": "language model", "recompute_activations": "recompute"}
    parts = []
    for key, value in changes.items():
        name = key.split(".")[1]
        name = short.get(name, name)
        parts.append(name if value is True else f"{name} {value}")
    return ", ".join(parts)
