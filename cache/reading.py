"""Reading rows back, by number or in order, checked against their checksums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray

from cache.codec import decode
from cache.layout import checksum_name
from cache.store import EmbeddingStore, RowStatus, open_store


class Batch(NamedTuple):
    """rows int64 [B]: row numbers; arrays: name -> [B, *shape], float16 or float32 as stored."""

    rows: NDArray[np.int64]
    arrays: dict[str, np.ndarray]


class RowsUnavailableError(LookupError):
    """Rows were asked for that are pending or failed, or do not exist."""


class DamagedRowsError(RuntimeError):
    """Stored rows do not match their checksums."""


def read_rows(
    where: str | Path | EmbeddingStore, rows: Iterable[int], names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Rows by number, in the order asked for: {array: [n, *shape]}, checked against their
    checksums.

    Raises RowsUnavailableError or DamagedRowsError, naming rows and files.
    """
    store = opened(where)
    wanted = np.asarray(list(rows), np.int64)
    status = store.status()
    if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(status)):
        raise RowsUnavailableError(f"{store.location} has rows 0 to {len(status) - 1}")
    missing = wanted[status[wanted] != RowStatus.DONE]
    if len(missing):
        state = RowStatus(status[missing[0]]).name.lower()
        raise RowsUnavailableError(
            f"{store.location}: row {missing[0]} is {state} ({len(missing)} such rows asked for)"
        )
    order, back = np.unique(wanted, return_inverse=True)
    result = {}
    for name in names or list(store.spec.arrays):
        array = store.array_spec(name)
        stored = np.empty((len(order), *array.stored_row_shape), array.codec.dtype)
        table = store.table(checksum_name(name))
        if damaged := read_sorted(store, name, order, table, stored):
            raise DamagedRowsError(damage_report(store, name, damaged))
        result[name] = decode(store.fitted(name), stored, back)
    return result


def iterate_blocks(
    where: str | Path | EmbeddingStore,
    names: Sequence[str] | None = None,
    *,
    block_rows: int = 1024,
    subset: Iterable[int] | None = None,
) -> Iterator[Batch]:
    """All done rows (of `subset`) in row order, about block_rows at a time, read ahead by one
    block.

    For indexes and evaluation. Raises DamagedRowsError, naming rows and files.
    """
    store = opened(where)
    done = np.flatnonzero(store.status() == RowStatus.DONE)
    if subset is not None:
        done = np.intersect1d(done, np.asarray(list(subset), np.int64))
    cuts = np.flatnonzero(np.diff(done // block_rows)) + 1
    blocks = [block for block in np.split(done, cuts) if len(block)]
    with ThreadPoolExecutor(1, "cache-read") as pool:
        following: Future[dict[str, np.ndarray]] | None = None
        for i, rows in enumerate(blocks):
            current = following or pool.submit(read_rows, store, rows, names)
            if i + 1 < len(blocks):
                following = pool.submit(read_rows, store, blocks[i + 1], names)
            yield Batch(rows, current.result())


def opened(where: str | Path | EmbeddingStore) -> EmbeddingStore:
    return where if isinstance(where, EmbeddingStore) else open_store(where)


def read_sorted(
    store: EmbeddingStore,
    name: str,
    rows: NDArray[np.int64],
    checksums: np.ndarray | zarr.Array,
    out: np.ndarray,
) -> dict[int, str]:
    """Read ascending rows into out [n, *stored_row_shape]; returns {damaged row: what is wrong}.

    Rows close together are read in one go, with what lies between them.
    """
    compressed = store.array_spec(name).codec.compressor != "none"
    reach = store.spec.inner_rows(name) if compressed else 2
    cuts = np.flatnonzero(np.diff(rows) > reach) + 1
    damaged: dict[int, str] = {}
    for first, last in zip([0, *cuts], [*cuts, len(rows)]):
        run = rows[first:last]
        if len(run) == 0:
            continue
        start, span = int(run[0]), int(run[-1] - run[0]) + 1
        into = out[first:last]
        direct = span == len(run)
        values = into if direct else np.empty((span, *out.shape[1:]), out.dtype)
        wanted = np.zeros(span, bool)
        wanted[run - start] = True
        sums = np.asarray(checksums[start : start + span])
        bad = store.read_checked(name, start, sums, wanted, values)
        if not direct:
            into[...] = values[run - start]
        damaged.update({start + offset: reason for offset, reason in bad.items()})
    return damaged


def damage_report(store: EmbeddingStore, name: str, damaged: Mapping[int, str]) -> str:
    row, reason = next(iter(damaged.items()))
    more = f" and {len(damaged) - 1:,} more rows near it" if len(damaged) > 1 else ""
    return (
        f"{store.shard_file(name, row)} (shard {row // store.spec.shard_rows}): row {row}{more}: "
        f"{reason}. Verify and repair the store, then fill it again."
    )
