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
from cache.store import EmbeddingStore, RowStatus, open_store
from gill_errors import GillError


class Batch(NamedTuple):
    """rows int64 [B]: row numbers; arrays: name -> [B, *shape], float16 or float32 as stored."""

    rows: NDArray[np.int64]
    arrays: dict[str, np.ndarray]


class RowsUnavailableError(GillError, LookupError):
    """Rows were asked for that are pending or failed, or do not exist."""


class DamagedRowsError(GillError, RuntimeError):
    """Stored rows do not match their checksums."""


def read_rows(
    where: str | Path | EmbeddingStore, rows: Iterable[int], names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Rows by number, in the order asked for: {array: [n, *shape]}.

    Raises RowsUnavailableError or DamagedRowsError, naming rows and files.
    """
    store = open_store(where)
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
    names = names or list(store.spec.arrays)
    # Ascending and each once for reading, then back in the order asked for.
    order, back = np.unique(wanted, return_inverse=True)
    tables = {name: store.checksums(name) for name in names}
    index = slice(None) if np.array_equal(order, wanted) else back
    return _read(store, order, index, tables)


def iterate_blocks(
    where: str | Path | EmbeddingStore,
    names: Sequence[str] | None = None,
    *,
    block_rows: int = 1024,
    subset: Iterable[int] | None = None,
) -> Iterator[Batch]:
    """All done rows (of `subset`) in row order, block by block, read ahead by one block.

    For indexes and evaluation. Raises DamagedRowsError, naming rows and files.
    """
    store = open_store(where)
    done = np.flatnonzero(store.status() == RowStatus.DONE)
    if subset is not None:
        done = np.intersect1d(done, np.asarray(list(subset), np.int64))
    # Blocks end at multiples of block_rows, as shards do where it divides them.
    cuts = np.flatnonzero(np.diff(done // block_rows)) + 1
    names = names or list(store.spec.arrays)
    tables = {name: np.asarray(store.checksums(name)[...]) for name in names}
    with ThreadPoolExecutor(1, "cache-read") as pool:
        ahead: Future[Batch] | None = None
        for rows in np.split(done, cuts):
            # Asked for before the one ahead is handed out, so that it is read meanwhile.
            following = pool.submit(
                lambda rows: Batch(rows, _read(store, rows, slice(None), tables)), rows
            )
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None and len(done):
            yield ahead.result()


def _read(
    store: EmbeddingStore,
    rows: NDArray[np.int64],
    index: NDArray[np.intp] | slice,
    tables: Mapping[str, np.ndarray | zarr.Array],
) -> dict[str, np.ndarray]:
    """Ascending rows of the arrays in tables {array: checksums [N]}, taken at index."""
    result = {}
    for name, checksums in tables.items():
        array = store.array_spec(name)
        stored = np.empty((len(rows), *array.stored_row_shape), array.codec.dtype)
        if damaged := read_sorted(store, name, rows, checksums, stored):
            raise DamagedRowsError(damage_report(store, name, damaged))
        result[name] = decode(store.fitted(name), stored, index)
    return result


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
    # A small gap costs less to read over than to begin anew; Zarr reads whole inner chunks anyway.
    reach = 2 if store.reads_straight(name) else store.spec.inner_rows(name)
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
    """One line on rows that are not what was written, and what to do."""
    row, reason = next(iter(damaged.items()))
    more = f" and {len(damaged) - 1:,} more rows near it" if len(damaged) > 1 else ""
    return (
        f"{store.shard_file(name, row)} (shard {row // store.spec.shard_rows}): row {row}{more}: "
        f"{reason}. Verify and repair the store, then fill it again."
    )
