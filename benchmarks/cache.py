"""The embedding cache beside the ways it replaces.

    python -m benchmarks.cache [--quick] [--json FILE]

Shuffled batches of 200 rows of [77, 768] float16, all files in the page cache, every way in turn:

- `vs_mmap`: our throughput, in epochs after the first, over that of one memory-mapped .npy from
  which one thread gathers the same batches. `vs_mmap_blocks`: over copying out the same blocks,
  unmixed. The first epoch of a reader, which checks every row, is in the table.
- `vs_fancy_indexing`: over plain Zarr fancy indexing (`oindex`) on the same store.
- `vs_npy_per_row`: over one .npy per caption, which is what the released code keeps.
- `bytes_ratio`, `relative_error`: what int8 with a shared first position takes beside float16, and
  the relative squared error it adds, on synthetic values spread as after a layer norm.

Also: the speed of filling, the seconds to open 3.3 million rows and count their status, the files
that such a store has, and (without --quick) the peak memory for 4096 and for 16384 rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

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
from cache.location import locate
from cache.store import open_for_writing

SHAPE = (77, 768)
ROW_BYTES = 77 * 768 * 2
BATCH = 200
MILLIONS = 3_300_000


def encode(rows: list[int]) -> dict[str, np.ndarray]:
    """Values as after a layer norm: channels of different spread, a constant position 0."""
    values = np.stack([_pool()[row % len(_pool())] for row in rows])
    return {"embedding": values}


def make_roles() -> Roles:
    return Roles(read=int, encode=encode)


def spec(**codec: Any) -> StoreSpec:
    array = ArraySpec(dims={"position": 77, "channel": 768}, codec=Codec(**codec))
    return StoreSpec(arrays={"embedding": array})


def fill_store(path: Path, num_rows: int, **codec: Any) -> float:
    """Make a store; returns MB/s of float16 values."""
    params = FillingParams(batch_size=64, num_readers=1)
    rows = range(num_rows)
    report = fill(path, rows, spec(**codec), make_roles, provenance={}, params=params)
    return report.rows_per_second * ROW_BYTES / 1e6


@cache
def reader(path: Path) -> ShuffledRows:
    """One reader for all epochs, as a training run has."""
    return ShuffledRows({"embedding": (path, "embedding")}, batch_size=BATCH, seed=0)


def ours(path: Path) -> Iterator[int]:
    reader(path).load_state_dict({"epoch": 0, "step": 0})
    for batch in reader(path):
        yield len(batch.rows)


def first(path: Path) -> Iterator[int]:
    """The first epoch of a new reader: fresh memory, and every row is checked."""
    for batch in ShuffledRows({"embedding": (path, "embedding")}, batch_size=BATCH, seed=0):
        yield len(batch.rows)


def mapped(path: Path, npy: Path) -> Iterator[int]:
    """The same batches of the same epoch, each gathered from one memory-mapped file."""
    values = np.load(npy, mmap_mode="r")
    order = reader(path).order(0)
    for start in range(0, len(order), BATCH):
        yield len(np.take(values, order[start : start + BATCH], axis=0))


def unmixed(path: Path, npy: Path) -> Iterator[int]:
    """Only the blocks, in their order, copied out of the memory map: no batches are mixed."""
    values = np.load(npy, mmap_mode="r")
    for window in reader(path).windows(0):
        for piece in window.pieces:
            block = np.array(values[piece[0] : piece[-1] + 1])
            yield len(block)


def fancy(path: Path, batches: int) -> Iterator[int]:
    array = zarr.open_group(path, mode="r")["embedding"]
    assert isinstance(array, zarr.Array)
    rng = np.random.default_rng(0)
    for _ in range(batches):
        yield len(np.asarray(array.oindex[rng.permutation(array.shape[0])[:BATCH]]))


def per_row(folder: Path, num_rows: int) -> Iterator[int]:
    order = np.random.default_rng(0).permutation(num_rows)
    for start in range(0, num_rows, BATCH):
        rows = order[start : start + BATCH]
        yield len(np.stack([np.load(folder / f"{row}.npy") for row in rows]))


def throughput(run: Callable[[], Iterator[int]]) -> float:
    """MB/s of float16 values."""
    start = time.perf_counter()
    rows = sum(run())
    return rows * ROW_BYTES / 1e6 / (time.perf_counter() - start)


def compare(
    folder: Path, num_rows: int, rounds: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """(MB/s of each way, our speed over each, MB/s of filling).

    Medians over rounds in which all ways run one after the other, so that whatever else the machine
    does, it does to all of them; the first round warms up.
    """
    store, npy, single = folder / "store.zarr", folder / "all.npy", folder / "rows"
    filled = fill_store(store, num_rows)
    values = np.asarray(open_store(store).read_stored("embedding", 0, num_rows))
    np.save(npy, values)
    single.mkdir()
    num_single = min(num_rows, 1000)
    for row in range(num_single):
        np.save(single / f"{row}.npy", values[row])
    del values
    ways: dict[str, Callable[[], Iterator[int]]] = {
        "ours": partial(ours, store),
        "ours, first time": partial(first, store),
        "mmap": partial(mapped, store, npy),
        "mmap blocks": partial(unmixed, store, npy),
        "npy per row": partial(per_row, single, num_single),
        "fancy indexing": partial(fancy, store, 1),
    }
    seldom = ("ours, first time", "npy per row", "fancy indexing")  # slow
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds):
        for name, run in ways.items():
            if i < 4 or name not in seldom:
                speeds[name].append(throughput(run))
    medians = {name: statistics.median(found[1:]) for name, found in speeds.items()}
    return medians, {name: medians["ours"] / speed for name, speed in medians.items()}, filled


def smaller(folder: Path, num_rows: int) -> tuple[float, float]:
    """(bytes of int8 with a shared first position over those of float16, its error)."""
    sizes = []
    for name, codec in [("half", {}), ("int8", {"dtype": "int8", "share_first": True})]:
        fill_store(folder / f"{name}.zarr", num_rows, **codec)
        sizes.append(describe(folder / f"{name}.zarr").arrays[0])
    error = sizes[1].measured["relative_squared_error_mean"]
    return sizes[1].stored_bytes / sizes[0].stored_bytes, error


def millions(folder: Path) -> tuple[float, int]:
    """(seconds to open 3.3 million rows and count their status, files of that store if full)."""
    location = locate(folder / "millions.zarr")
    store = open_for_writing(location, spec(), {}, {})
    store.match_rows(np.arange(MILLIONS, dtype=np.uint64))
    start = time.perf_counter()
    assert open_store(location).status_counts()["pending"] == MILLIONS
    return time.perf_counter() - start, store.spec.most_files(MILLIONS)


def peak_memory(num_rows: int) -> float:
    """MB of a process that fills and reads that many rows."""
    command = [sys.executable, "-m", "benchmarks.cache", "--peak-memory", str(num_rows)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure_peak_memory(num_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill_store(Path(folder) / "store.zarr", num_rows)
        sum(ours(Path(folder) / "store.zarr"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


_values: list[np.ndarray] = []


def _pool() -> np.ndarray:
    """A few different rows, so that making them does not dominate: float32 [64, 77, 768]."""
    if not _values:
        rng = np.random.default_rng(0)
        spread = np.exp(rng.normal(-0.2, 0.4, 768))
        spread[rng.integers(0, 768, 4)] *= 12
        values = rng.normal(size=(64, *SHAPE)) * spread + rng.normal(size=768) * 0.3
        values[:, 0] = rng.normal(size=768) * 2 * spread
        _values.append(values.astype(np.float32))
    return _values[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="end within 50 s on two cores")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--peak-memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory:
        return _measure_peak_memory(options.peak_memory)
    num_rows, rounds = (5120, 40) if options.quick else (12288, 40)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speeds, ratios, filled = compare(folder, num_rows, rounds)
        bytes_ratio, error = smaller(folder, 256 if options.quick else 2048)
        opening, num_files = millions(folder)
    result = {
        "vs_mmap": ratios["mmap"],
        "vs_fancy_indexing": ratios["fancy indexing"],
        "vs_npy_per_row": ratios["npy per row"],
        "bytes_ratio": bytes_ratio,
        "relative_error": error,
        "vs_mmap_blocks": ratios["mmap blocks"],
        "fill_mb_per_s": filled,
        "open_3_3_million_s": opening,
        "files_3_3_million": num_files,
    }
    if not options.quick:
        small, large = peak_memory(4096), peak_memory(16384)
        print(f"peak memory: {small:,.0f} MB for 4096 rows, {large:,.0f} MB for 16384 rows")
        result |= {"peak_memory_mb": large, "peak_memory_growth": large / small}
    print(f"{num_rows} rows of [77, 768] float16, batches of {BATCH}, medians of {rounds} rounds")
    for way, speed in speeds.items():
        print(f"  {way:16} {speed:8,.0f} MB/s   ours is {ratios[way]:.2f} times that")
    print(f"  filling          {filled:8,.0f} MB/s, with an encoder that costs nothing")
    print(f"  int8, first position shared: {bytes_ratio:.3f} of the bytes, error {error:.2g}")
    print(f"  3.3 million rows: {opening:.2f} s to open and count, at most {num_files:,} files")
    text = json.dumps(result)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)
    return None


if __name__ == "__main__":
    main()
