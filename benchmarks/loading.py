"""Training steps fed from the cache beside steps fed from memory.

    python -m benchmarks.loading [--device cuda] [--quick] [--json FILE]

    fed_vs_memory    steps per second, fed from the cache / from batches that are on the device

Features and targets of the paper's sizes lie in two stores on this machine's disk, uncompressed as
presets have them; a thread reads shuffled rows and sends them ahead of the step, as `stages train`
does. Captions differ in length, so every step has shapes of its own on both sides. Random weights:
OPT-6.7B on a GPU, batches of 200; OPT-125M and 8 on a CPU. `rows/s` is the loader alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Bench, Numbers, run
from benchmarks.random_models import batch_of, opt_gill
from benchmarks.train_step import product_step
from cache import ArraySpec, Codec, FillingParams, Roles, ShuffledRows, StoreSpec, fill
from cache.shuffled_rows import in_background
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.heads import HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws
from pipeline.devices import sent


def measure(bench: Bench) -> None:
    gill = opt_gill(bench.size("toy", "125m", "6.7b"), bench.device, bench.dtype)
    rows, size = bench.size((8, 4), (64, 8), (2048, 200))
    with tempfile.TemporaryDirectory() as folder:
        stores = fill_stores(Path(folder), rows, gill.heads.sizes)
        bench.part("steps", lambda: fed(bench, gill, stores, size), vs_memory="fed_vs_memory")


def fill_stores(folder: Path, num_rows: int, sizes: HeadSizes) -> dict[str, tuple[Path, str]]:
    """Random rows of both stores, as float16; an encoder that costs nothing."""
    arrays = {"pooled": {"visual": sizes.d}, "embedding": {"position": sizes.L, "channel": sizes.D}}
    sources = {}
    for name, dims in arrays.items():
        values = np.random.default_rng(0).normal(size=(64, *dims.values())).astype(np.float16)
        spec = StoreSpec(arrays={name: ArraySpec(dims=dims, codec=Codec(dtype="float16"))})
        roles = Roles(read=int, encode=lambda rows: {name: values[np.array(rows) % 64]})  # noqa: B023
        where, params = folder / f"{name}.zarr", FillingParams(batch_size=64)
        fill(where, range(num_rows), spec, lambda: roles, provenance={}, params=params)  # noqa: B023
        sources[name] = (where, name)
    return sources


def loaded(
    gill: MultimodalLanguageModel, stores: dict[str, tuple[Path, str]], size: int
) -> Iterator[CaptionBatch]:
    """Batches without end, on the device: captions at random, vectors from the stores."""
    rows, device = (
        ShuffledRows(stores, batch_size=size, seed=0, drop_last=True),
        gill.language_model.device,
    )
    for seed in cycle(range(100)):
        for read in rows:
            pooled, targets = (
                sent(torch.from_numpy(read.arrays[name]), device).float()
                for name in ("pooled", "embedding")
            )
            captions = batch_of(gill, size, seed=seed)
            yield replace(captions, pooled=pooled, targets=targets)


def fed(
    bench: Bench, gill: MultimodalLanguageModel, stores: dict[str, tuple[Path, str]], size: int
) -> Numbers:
    """Both in turn, several steps at a time, as one has the next batch read meanwhile."""
    step, draws = product_step(gill), PackingDraws.same(size, False)
    number = bench.size(2, 4, 20)
    batches = in_background(lambda: loaded(gill, stores, size), depth=1)
    in_memory = list(islice(batches, number))

    def from_memory() -> None:
        for batch in in_memory:
            step(batch, draws)

    def from_cache() -> None:
        for batch in islice(batches, number):
            step(batch, draws)

    from_memory()  # warm
    try:
        numbers = bench.in_turn(
            1 if bench.quick or bench.toy else 3, memory=from_memory, cache=from_cache
        )
        seconds = bench.once(lambda: list(islice(batches, number)))
    finally:
        batches.close()
    return {
        "vs_memory": numbers["memory_s"] / numbers["cache_s"],
        "spread": numbers["spread"],
        "step_s": numbers["cache_s"] / number,
        "memory_step_s": numbers["memory_s"] / number,
        "rows/s": number * size / seconds,
    }


if __name__ == "__main__":
    run(measure, __doc__, wall=True)
