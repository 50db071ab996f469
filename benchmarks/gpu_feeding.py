"""From the cache into the device's memory: shuffled batches of 200, as training reads them.

A store of [77, 768] float16 targets and one of [1024] float16 features are written to a temporary
folder. The first epoch checks every row against its checksum; the second is what most of
training sees. `pinned` copies float16 from page-locked memory without waiting and widens it on the
device; `pageable` widens on the CPU first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_measure import Machine, Numbers, Report
from cache import ArraySpec, Codec, FillingParams, Roles, ShuffledRows, StoreSpec, fill
from pipeline.devices import sent

BATCH = 200
Move = Callable[[np.ndarray], Tensor]


def feeding(machine: Machine, report: Report) -> None:
    """Read alone, then with both ways to the device."""

    def pageable(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float().to(machine.device)

    def pinned(values: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(values), torch.device(machine.device)).float()

    ways: dict[str, Move] = {
        "read only": torch.from_numpy,
        "pageable to device": pageable,
        "pinned to device": pinned,
    }
    with tempfile.TemporaryDirectory() as folder:
        report.measure("writing", partial(written, machine, Path(folder)))
        if "bytes_per_s" in report.parts["writing"]:
            for name, move in ways.items():
                report.measure(name, partial(fed, machine, Path(folder), move))


def written(machine: Machine, folder: Path) -> Numbers:
    """Both stores, filled with random numbers."""
    rows = 64 if machine.toy else 8192
    targets = {"position": 7, "channel": 8} if machine.toy else {"position": 77, "channel": 768}
    features = {"visual": 16 if machine.toy else 1024}
    start = time.perf_counter()
    size = _fill(folder / "targets.zarr", "embedding", targets, rows)
    size += _fill(folder / "features.zarr", "pooled", features, rows)
    seconds = time.perf_counter() - start
    return {"gb": size / 1e9, "bytes_per_s": size / seconds, "rows_per_s": rows / seconds}


def _fill(store: Path, array: str, dims: dict[str, int], rows: int) -> int:
    """Returns the bytes of the values."""
    shape = (256, *dims.values())
    sample = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
    roles = Roles(read=str, encode=lambda batch: {array: sample[: len(batch)]})
    fill(
        store,
        [str(i) for i in range(rows)],
        StoreSpec(
            arrays={array: ArraySpec(dims=dims, codec=Codec(dtype="float16"))}, shard_rows=1024
        ),
        lambda: roles,
        provenance={"model": "random"},
        params=FillingParams(batch_size=len(sample)),
    )
    return rows * sample[0].nbytes


def fed(machine: Machine, folder: Path, move: Move) -> Numbers:
    """The first epoch of a reader, and its second."""
    rows = ShuffledRows(
        {
            "embedding": (folder / "targets.zarr", "embedding"),
            "visual": (folder / "features.zarr", "pooled"),
        },
        batch_size=16 if machine.toy else BATCH,
        seed=0,
        drop_last=True,
    )
    first = _epoch(machine, rows, move)
    return {"first_epoch_bytes_per_s": first["bytes_per_s"], **_epoch(machine, rows, move)}


def _epoch(machine: Machine, rows: ShuffledRows, move: Move) -> dict[str, float]:
    start, size, count = time.perf_counter(), 0, 0
    for batch in rows:
        on_device = [move(values) for values in batch.arrays.values()]
        size += sum(values.nbytes for values in batch.arrays.values())
        count += len(batch.rows)
        del on_device
    machine.wait()
    seconds = time.perf_counter() - start
    return {"bytes_per_s": size / seconds, "rows_per_s": count / seconds}
