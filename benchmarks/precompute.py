"""Precomputing into the cache beside a bare loop that runs the same model on data in memory.

    python -m benchmarks.precompute [--device cuda] [--quick] [--json FILE]

    features_vs_bare, targets_vs_bare    rows per second through the cache / of the bare loop
    sleeping_vs_bare                     the same with 16 readers and shards of 1024 rows, for a
                                         stand-in for a device that takes 1 ms a row: with as many
                                         cores as `ms` of reading
    sleeping_vs_bare_small               on pictures that one core reads in 0.6 ms

Random models of real sizes: CLIP on JPEG files of 500 x 375 pixels (ViT-B/32 on a CPU, ViT-L/14 on
a GPU), and the text encoder of Stable Diffusion 1.x. One thread for the model on a CPU; the cache's
own readers and writers run beside it.

The bare loop sends batches from the CPU and fetches what comes out, all in flight at once. On a GPU
also: more readers, the opening of files by all threads, the models alone, by dtype and batch (hours
`cc3m_h` are for 3.3 million pictures), compiled, and where their time goes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Bench, Numbers, count_flop, run
from benchmarks.random_models import stable_diffusion
from cache import ArraySpec, Codec, FillingParams, Roles, StoreSpec, fill
from corpora.pictures import open_picture
from miniature.backbones import SHIPPED
from pipeline.devices import Arriving
from pipeline.frozen.text_conditioner import TextConditioner
from pipeline.frozen.visual_encoder import VisualEncoder, load_visual_encoder

CAPTION = "on the left there is a red ring"


def measure(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        features(bench, Path(folder))
    targets(bench)


def features(bench: Bench, folder: Path) -> None:
    """The visual encoder."""
    toy = f"local-dir:{SHIPPED.visual_encoder}"
    source = bench.size(toy, "ViT-B-32", "ViT-L-14-quickgelu")
    encoder = load_visual_encoder(source, device=bench.device)
    size = bench.size(4, 16, 256)
    files = jpeg_files(folder, 8 if bench.toy else 48 if bench.quick else 512)
    rows = [f"{path}\t{i}" for i in range(8 if bench.on_gpu else 1) for path in files]

    def read(row: str) -> Any:
        return encoder.preprocess(open_picture(row.split("\t")[0]))

    def encode(pixels: list[Any]) -> dict[str, Any]:
        return {"pooled": Arriving(encoder.pooled_of(pixels))}

    def opening() -> Numbers:
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            seconds = bench.seconds(lambda: list(pool.map(read, files)), times=2)
        return {"pictures/s": len(files) / seconds, "threads": threads}

    def alone(batch: int) -> Numbers:
        """Pixels on the device already, in the model's dtype."""
        shape = (batch, 3, *encoder.image_size)
        pixels = torch.randn(*shape, device=bench.device).to(encoder.dtype)
        first = bench.once(lambda: encoder.pooled(pixels))
        seconds = bench.seconds(lambda: encoder.pooled(pixels))
        rate = bench.rate(batch * count_flop(lambda: encoder.pooled(pixels[:1])), seconds)
        hours = 3.3e6 / batch * seconds / 3600
        return {"pictures/s": batch / seconds, "cc3m_h": hours, **rate, "first_s": first}

    cast(encoder, bench.dtype)
    spec = StoreSpec(arrays={"pooled": ArraySpec(dims={"visual": encoder.width})}, shard_rows=32)
    in_memory = [read(path) for path in files] * (len(rows) // len(files))
    roles = Roles(read=read, encode=encode)
    beside = partial(beside_bare, bench, rows, in_memory, roles, spec, size)
    bench.part("features", beside, vs_bare="features_vs_bare")
    asleep = Roles(read=read, encode=partial(sleeping, encoder.width))
    large = spec.model_copy(update={"shard_rows": 1024})
    small = [f"{path}\t{i}" for i in range(8) for path in jpeg_files(folder, len(files), (60, 45))]
    for name, many, headline in (
        ("500 x 375", rows if bench.toy else rows * 8, "sleeping_vs_bare"),
        ("small pictures", small, "sleeping_vs_bare_small"),
    ):
        with_16 = partial(beside_bare, bench, many, many, asleep, large, size, num_readers=16)
        bench.part(f"16 readers, model of 1 ms a row, {name}", with_16, vs_bare=headline)
        bench.part(f"reading, on one core, {name}", partial(reading, read, many[: len(files)]))
    if not bench.extra:
        return
    bench.part("features, 16 readers", partial(beside, num_readers=16))
    bench.part("opening files", opening)
    for batch in (2,) if bench.toy else (64, 256, 512):
        bench.part(f"{bench.dtype}, {batch}".removeprefix("torch."), partial(alone, batch))
    pixels = torch.randn(size, 3, *encoder.image_size, device=bench.device)
    bench.part("features, kernels", lambda: bench.kernels(lambda: encoder.pooled(pixels)))
    for name, precision in {"TF32": "high", "float32": "highest", "float16": "highest"}.items():
        cast(encoder, torch.float16 if name == "float16" else torch.float32)
        torch.set_float32_matmul_precision(precision)
        bench.part(f"{name}, {size}", partial(alone, size))
    if not bench.quick:
        model: Any = encoder.model
        model.visual.compile(dynamic=False, backend="inductor" if bench.on_gpu else "eager")
        bench.part(f"compiled, {size}", partial(alone, size))


def sleeping(width: int, pixels: list[Any]) -> dict[str, Any]:
    """A model on a device: the processor is free while it takes 1 ms a row."""
    time.sleep(1e-3 * len(pixels))
    return {"pooled": np.zeros((len(pixels), width), np.float32)}


def reading(read: Callable[[str], Any], rows: list[str]) -> Numbers:
    """Processor time to read and preprocess a picture: for a model of 1 ms a row, as many cores."""
    before = time.process_time()
    for row in rows:
        read(row)
    return {"ms": (time.process_time() - before) / len(rows) * 1e3}


def cast(encoder: VisualEncoder, dtype: torch.dtype) -> None:
    """Let it compute in another dtype."""
    encoder.model.to(dtype)
    encoder.dtype = dtype


def jpeg_files(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> list[str]:
    """Files of so many pixels, smooth enough to be as large as photographs are."""
    noise = np.random.default_rng(0)
    paths = [str(folder / f"{size[0]}-{i}.jpg") for i in range(count)]
    for path in paths:
        coarse = Image.fromarray(noise.integers(0, 255, (48, 64, 3), np.uint8))
        coarse.resize(size).save(path, quality=90)
    return paths


def targets(bench: Bench) -> None:
    """The generator's text encoder."""
    where = {"dtype": bench.dtype, "device": bench.device}
    conditioner = TextConditioner(stable_diffusion("text_encoder", toy=bench.toy, **where))
    size, rows = bench.size((4, 8), (8, 16 if bench.quick else 128), (256, 2048))

    def encode(batch: list[str]) -> dict[str, Any]:
        return {"embedding": Arriving(conditioner.encode(batch).embedding, torch.float16)}

    def alone(batch: int) -> Numbers:
        """With tokenising, left on the device."""
        seconds = bench.seconds(lambda: conditioner.encode([CAPTION] * batch))
        flop = batch * count_flop(lambda: conditioner.encode([CAPTION]))
        return {"captions/s": batch / seconds, **bench.rate(flop, seconds)}

    captions, roles = [f"{CAPTION} {i}" for i in range(rows)], Roles(read=str, encode=encode)
    dims = {"position": conditioner.length, "channel": conditioner.width}
    for shared in (False,) if bench.quick else (False, True):
        codec = Codec(dtype="float16", share_first=shared)
        arrays = {"embedding": ArraySpec(dims=dims, codec=codec)}
        spec = StoreSpec(arrays=arrays, shard_rows=size)
        headline = {} if shared else {"vs_bare": "targets_vs_bare"}
        work = partial(beside_bare, bench, captions, captions, roles, spec, size)
        bench.part(f"targets{', first shared' * shared}", work, **headline)
    if bench.extra:
        for batch in (2,) if bench.toy else (64, 256, 1024):
            bench.part(f"captions, {batch}", partial(alone, batch))
        some = partial(conditioner.encode, [CAPTION] * size)
        bench.part("targets, kernels", lambda: bench.kernels(some))


def beside_bare(
    bench: Bench,
    rows: list[str],
    in_memory: list[Any],
    roles: Roles,
    spec: StoreSpec,
    batch_size: int,
    **filling: int,
) -> Numbers:
    """Rows through the cache into a new store, and what they give in memory through the model."""
    params = FillingParams(batch_size=batch_size, **filling)
    starts = range(0, len(in_memory), batch_size)

    def bare() -> None:
        for arrays in [roles.encode(in_memory[at : at + batch_size]) for at in starts]:
            for values in arrays.values():
                np.asarray(values)

    def cached() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder, "store.zarr")
            fill(store, rows, spec, lambda: roles, provenance={"model": "random"}, params=params)

    roles.encode(in_memory[:batch_size])  # warm up
    numbers = bench.in_turn(1 if bench.quick or bench.toy else 2, cached=cached, bare=bare)
    return {
        "vs_bare": numbers["speedup"],
        "spread": numbers["spread"],
        "rows/s": len(rows) / numbers["cached_s"],
        "bare_rows/s": len(rows) / numbers["bare_s"],
    }


if __name__ == "__main__":
    run(measure, __doc__, wall=True)
