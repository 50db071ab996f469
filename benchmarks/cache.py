"""Reading the embedding cache in training's order beside the ways it replaces.

    python -m benchmarks.cache [--device cuda] [--quick] [--peers] [--json FILE]

Shuffled batches of 200 rows of [77, 768] float16, all files in the page cache, every way in turn:

- `vs_mmap`: our throughput, in epochs after the first, over that of one memory-mapped .npy from
  which one thread gathers the same batches. `vs_mmap_blocks`: over copying out the same blocks,
  unmixed. The first epoch of a reader, which checks every row, is in the table.
- `vs_fancy_indexing`: over plain Zarr fancy indexing (`oindex`) on the same store.
- `vs_npy_per_row`: over one .npy per caption, which is what the released code keeps.
- `bytes_ratio`, `relative_error`: what int8 with a shared first position takes beside float16, and
  the relative squared error it adds, on synthetic values spread as after a layer norm.
- `order_s`, `order_mb`: planning an epoch of 3.3 million rows, up to its first windows, for one of
  8 processes. Beside it, of one of 1, 8 and 64: the rows of two windows, which compressed or remote
  stores hold in memory, and what such stores read over what is taken (1 where stores are local and
  uncompressed: rows are read one by one there).
- `fill_vs_save`: filling, with an encoder that costs nothing, over `np.save` of the same shards, as
  they are stored, each forced to the disk; in pairs. `fill_float32_vs_save`: what comes in float32
  is cast and its error measured.

What bounds reading, in processor time of all threads on a machine of two virtual cores: from the
page cache `preadv` copies rows at 4.3 GB/s, one memory map that stays copies them at 6 to 7, one
that is made anew for every window at 4.3 to 4.8; CRC-32C is computed at 5.8. A map that stays would
copy 1.4 times as fast. It is not used: a file that is cut short, or a disk that fails, would end
the process by a signal, where a read names the shard and the row. Filling from float32 takes 106 us
a row to cast and measure (167 before a row was looked at twice less), 22 to check, 28 to write;
from float16 29, 22 and 28.

`--peers` instead reads the same rows through other libraries (`cache_peers`), in pairs with ours:
warm, and cold: with the files dropped from the page cache, ours by a new reader, which checks them.

Also: the seconds to open 3.3 million rows and count their status, the files
that such a store has, and (on a CPU, without --quick) the peak memory for 4096 and for 16384 rows.
With a GPU the batches also go into its memory: `pinned` copies float16 from page-locked memory
without waiting and widens it there, `pageable` widens on the CPU first.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
import zarr
from torch import Tensor

from benchmarks.cache_peers import BATCH, beside_peers
from benchmarks.harness import Bench, Numbers, in_new_process, peak, run
from cache import (
    ArraySpec,
    Codec,
    FillingParams,
    Roles,
    ShuffledRows,
    StoreSpec,
    describe,
    fill,
    open_store,
)
from cache.epoch_order import Share, plan_epoch
from cache.location import locate
from cache.store import open_for_writing
from pipeline.devices import sent

ORDER = {"block_rows": 128, "buffer_rows": 2048, "seed": 0, "epoch": 0}
ROW_BYTES = 77 * 768 * 2
HALF = Codec(dtype="float16")
Way = Callable[[], Iterator[int]]
"""Reads every row of an epoch, or some; yields how many at a time."""


def measure(bench: Bench) -> None:
    num_rows = bench.size(400, 5120 if bench.quick else 12288, 5120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if bench.given.peers:
            fill_store(store := folder / "store.zarr", num_rows)
            beside_peers(bench, store, partial(ours, store), partial(first, store))
            return
        pairs = bench.size(1, 3, 7)
        for dtype, key in (("float16", "fill_vs_save"), ("float32", "fill_float32_vs_save")):
            part = partial(filling, folder / dtype, num_rows, dtype, pairs)
            bench.part(f"filling, from {dtype}", part, vs_save=key)
        fill_store(folder / "store.zarr", num_rows)
        compare(bench, folder, num_rows)
        few = 64 if bench.toy else 256 if bench.quick else 2048
        headline = {"bytes_ratio": "bytes_ratio", "relative_error": "relative_error"}
        bench.part("int8, first position shared", partial(smaller, folder, few), **headline)
        many = 10_000 if bench.toy else 3_300_000
        bench.part(f"opening {many:,} rows", partial(opening, bench, folder, many))
        planned = {"order_s": "order_s", "order_mb": "order_mb"}
        bench.part(f"order of {many:,} rows", partial(planning, bench, many), **planned)
        for processes in (1, 8, 64):
            bench.part(f"reads of one of {processes}", partial(reads, many, processes))
    if not (bench.quick or bench.extra):
        bench.part("memory, 4096 and 16384 rows", growth)


def compare(bench: Bench, folder: Path, num_rows: int) -> None:
    """Medians over rounds in which all ways run one after the other, so that whatever else the
    machine does, it does to all of them; the first round warms up."""
    store, npy, single = folder / "store.zarr", folder / "all.npy", folder / "rows"
    values = np.asarray(open_store(store).read_stored("embedding", 0, num_rows))
    np.save(npy, values)
    single.mkdir()
    num_single = min(num_rows, 1000)
    for row in range(num_single):
        np.save(single / f"{row}.npy", values[row])
    del values
    device = torch.device(bench.device)
    ways: dict[str, Way] = {
        "ours": partial(ours, store),
        "mmap": partial(mapped, store, npy),
        "mmap blocks": partial(unmixed, store, npy),
    }
    if bench.extra:
        ways["ours, pinned"] = partial(ours, store, lambda values: sent(values, device).float())
        ways["ours, pageable"] = partial(ours, store, lambda values: values.float().to(device))
    often = len(ways)
    ways["ours, first time"] = partial(first, store)
    ways["npy per row"] = partial(per_row, single, num_single)
    ways["fancy indexing"] = partial(fancy, store)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(bench.size(2, 40, 10)):
        for name, way in list(ways.items())[: None if i < 4 else often]:
            rows: list[int] = []
            seconds = bench.once(lambda: rows.extend(way()))  # noqa: B023
            speeds[name].append(sum(rows) / seconds)
    medians = {name: median(found[1:]) for name, found in speeds.items()}
    for name, speed in medians.items():
        numbers = {"mb_per_s": speed * ROW_BYTES / 1e6, "rows_per_s": speed}
        numbers["ours_vs_this"] = medians["ours"] / speed
        key = {} if "ours" in name else {"ours_vs_this": f"vs_{name.replace(' ', '_')}"}
        bench.part(name, partial(dict, numbers), **key)


@cache
def reader(path: Path) -> ShuffledRows:
    """One reader for all epochs, as a training run has."""
    return ShuffledRows({"embedding": (path, "embedding")}, batch_size=BATCH, seed=0)


def ours(path: Path, move: Callable[[Tensor], object] = id) -> Iterator[int]:
    reader(path).epoch = 0
    for batch in reader(path):
        move(torch.from_numpy(batch.arrays["embedding"]))
        yield len(batch.rows)


def first(path: Path) -> Iterator[int]:
    """The first epoch of a new reader: fresh memory, and every row is checked."""
    for batch in ShuffledRows({"embedding": (path, "embedding")}, batch_size=BATCH, seed=0):
        yield len(batch.rows)


def mapped(path: Path, npy: Path) -> Iterator[int]:
    """The same batches of the same epoch, each gathered from one memory-mapped file."""
    values, order = np.load(npy, mmap_mode="r"), reader(path).order(0)
    for start in range(0, len(order), BATCH):
        yield len(np.take(values, order[start : start + BATCH], axis=0))


def unmixed(path: Path, npy: Path) -> Iterator[int]:
    """Only the blocks, in their order, copied out of the memory map: no batches are mixed."""
    values = np.load(npy, mmap_mode="r")
    for window in reader(path).windows(0):
        for piece in window.pieces:
            yield len(np.array(values[piece[0] : piece[-1] + 1]))


def fancy(path: Path) -> Iterator[int]:
    """One batch by Zarr's own indexing."""
    array = zarr.open_group(path, mode="r")["embedding"]
    assert isinstance(array, zarr.Array)
    rows = np.random.default_rng(0).permutation(array.shape[0])[:BATCH]
    yield len(np.asarray(array.oindex[rows]))


def per_row(folder: Path, num_rows: int) -> Iterator[int]:
    order = np.random.default_rng(0).permutation(num_rows)
    for start in range(0, num_rows, BATCH):
        rows = order[start : start + BATCH]
        yield len(np.stack([np.load(folder / f"{row}.npy") for row in rows]))


def filling(folder: Path, num_rows: int, dtype: str, pairs: int) -> Numbers:
    """Medians; each pair is of one moment, as the speed of a disk is not that of the next."""
    ours, saved = [], []
    for _ in range(pairs + 1):  # the first warms up
        folder.mkdir()
        ours.append(fill_store(folder / "store.zarr", num_rows, dtype))
        shutil.rmtree(folder)
        folder.mkdir()
        saved.append(save_shards(folder, num_rows))
        shutil.rmtree(folder)
    ratio = median(one / other for one, other in zip(ours[1:], saved[1:]))
    return {"mb_per_s": median(ours[1:]), "save_mb_per_s": median(saved[1:]), "vs_save": ratio}


def save_shards(folder: Path, num_rows: int) -> float:
    """Whole shards of float16, each forced to the disk; returns MB/s."""
    rows = spec().shard_rows
    shard = np.tile(_values().astype(np.float16), (-(-rows // 64), 1, 1))[:rows]
    began = time.perf_counter()
    for start in range(0, num_rows, rows):
        with (folder / f"{start}.npy").open("wb") as file:
            np.save(file, shard[: num_rows - start])
            file.flush()
            os.fsync(file.fileno())
    return num_rows * ROW_BYTES / 1e6 / (time.perf_counter() - began)


def fill_store(path: Path, num_rows: int, dtype: str = "float32", codec: Codec = HALF) -> float:
    """Make a store, with an encoder that costs nothing; returns MB/s of float16 values."""
    params = FillingParams(batch_size=64)
    # A few different values in turn, and no copy of them: batches begin at multiples of 64.
    values = _values().astype(dtype)
    roles = Roles(read=int, encode=lambda rows: {"embedding": values[: len(rows)]})
    report = fill(path, range(num_rows), spec(codec), lambda: roles, provenance={}, params=params)
    return report.rows_per_second * ROW_BYTES / 1e6


def spec(codec: Codec = HALF) -> StoreSpec:
    array = ArraySpec(dims={"position": 77, "channel": 768}, codec=codec)
    return StoreSpec(arrays={"embedding": array})


@cache
def _values() -> np.ndarray:
    """As after a layer norm, channels of different spread, position 0 constant: [64, 77, 768]."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(-0.2, 0.4, 768))
    spread[rng.integers(0, 768, 4)] *= 12
    values = rng.normal(size=(64, 77, 768)) * spread + rng.normal(size=768) * 0.3
    values[:, 0] = rng.normal(size=768) * 2 * spread
    return values.astype(np.float32)


def smaller(folder: Path, num_rows: int) -> Numbers:
    """int8 with a shared first position: its bytes over those of float16, and its error."""
    sizes = []
    for name, codec in [("half", HALF), ("int8", Codec(dtype="int8", share_first=True))]:
        fill_store(folder / f"{name}.zarr", num_rows, codec=codec)
        sizes.append(describe(folder / f"{name}.zarr").arrays[0])
    error = sizes[1].measured["relative_squared_error_mean"]
    return {"bytes_ratio": sizes[1].stored_bytes / sizes[0].stored_bytes, "relative_error": error}


def opening(bench: Bench, folder: Path, num_rows: int) -> Numbers:
    """To open an empty store and count its rows' status; its files when it is full."""
    location = locate(folder / "millions.zarr")
    store = open_for_writing(location, spec(), {}, {})
    store.match_rows(np.arange(num_rows, dtype=np.uint64))
    seconds = bench.once(lambda: open_store(location).status_counts())
    return {"open_s": seconds, "files": store.spec.most_files(num_rows)}


def planning(bench: Bench, num_rows: int) -> Numbers:
    """Until the first windows of an epoch are there, for one of 8 processes."""

    def plan() -> None:
        order = plan_epoch(np.arange(num_rows), **ORDER)
        for _ in islice(order.windows(Share(BATCH, 3, 8)), 2):
            pass

    seconds = bench.once(plan)
    tracemalloc.start()
    plan()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"order_s": seconds, "order_mb": most / 1e6}


def reads(num_rows: int, processes: int) -> Numbers:
    """What one process reads for each row that it takes, in the first 50 windows."""
    share = Share(BATCH - BATCH % processes, processes // 2, processes)
    inner = spec().inner_rows("embedding")
    windows = list(islice(plan_epoch(np.arange(num_rows), **ORDER).windows(share), 50))
    taken = sum(len(window.rows) for window in windows)
    chunks = sum(len(np.unique(window.rows // inner)) for window in windows)
    return {
        "rows_held": 2 * max(len(window.rows) for window in windows),
        "blocks_per_window": float(np.mean([len(window.pieces) for window in windows])),
        "compressed_read_ratio": chunks * inner / taken,
    }


def growth() -> Numbers:
    """Of the peak memory."""
    small, large = (in_new_process(peak_memory, rows) for rows in (4096, 16384))
    return {"small_mb": small / 1e6, "large_mb": large / 1e6, "ratio": large / small}


def peak_memory(num_rows: int) -> int:
    """Bytes of a process that fills and reads that many rows."""
    with tempfile.TemporaryDirectory() as folder:
        fill_store(Path(folder) / "store.zarr", num_rows)
        sum(ours(Path(folder) / "store.zarr"))
    return peak("cpu")


if __name__ == "__main__":
    run(measure, __doc__, wall=True, peers=bool)
