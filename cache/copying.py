"""Tables that lost rows or have another order: stores of some rows of another, dropped rows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.layout import checksum_name, error_name
from cache.location import Location, locate
from cache.lock import run_lock
from cache.manifest import manifest_location, settle
from cache.reading import RowsUnavailableError, read_sorted
from cache.shards import shard_path, write_shard
from cache.store import EmbeddingStore, RowStatus, ShardResult, open_for_writing, open_store
from gill_errors import InputError

DROPPED = "dropped: gone from the table"


def copy_rows(
    source: str | Path | Location | EmbeddingStore, target: str | Path, rows: Iterable[int]
) -> EmbeddingStore:
    """Make at `target` a store of these rows of `source`, in this order, and encode nothing.

    rows: their numbers in `source`; -1: a row that it lacks.

    Rows keep their bytes, checksums and keys: `fill` with a table of the same rows finds them done,
    and encodes what the table has besides. Rows that are lacking, not done, or fail their checksum,
    are pending there. Whole shards that stay where they are become hard links. Killed and called
    again, it goes on.

    Raises RowsUnavailableError where `source` has no such row, InputError where both are one store,
    and what `fill` raises of a target that is another store or is being written.
    """
    store, location = open_store(source), locate(target)
    if location == store.location:
        raise InputError(f"{location}: a store cannot be copied onto itself; name another path")
    numbers = _row_numbers(store, rows, lowest=-1)
    there = numbers >= 0
    available, keys = np.zeros(len(numbers), bool), np.zeros(len(numbers), np.uint64)
    available[there] = store.status()[numbers[there]] == RowStatus.DONE
    keys[there] = store.read_table("row_key")[numbers[there]]
    tables = _tables(store)
    with run_lock(location):
        copy = begin_copy(store, location, keys)
        pending = copy.status() == RowStatus.PENDING
        for shard in range(store.spec.num_shards(len(numbers))):
            span = store.spec.shard_range(shard, len(numbers))
            here = slice(span.start, span.stop)
            # A shard is written whole: one in which anything is done was copied before, or filled.
            if available[here].any() and pending[here].all():
                taken = np.flatnonzero(available[here])
                sound = _copy_shard(store, copy, tables, shard, numbers[here], taken)
                copy.commit(_result(store, tables, shard, numbers[here], sound))
        settle(copy)
    return copy


def drop_rows(where: str | Path, rows: Iterable[int]) -> None:
    """Mark rows that are gone from the table, in place: no reader gives them, no shard is written.

    They count as failed, with that reason. Rows keep their numbers; `compact` makes a store without
    the dropped ones. A `fill` with `retry_failed` whose table still has one of them encodes it.

    Raises RowsUnavailableError where there is no such row.
    """
    location = locate(where)
    with run_lock(location):
        store = open_store(location, writable=True)
        numbers = _row_numbers(store, rows)
        manifest_location(location).remove()
        store.mark_failed(numbers, DROPPED)
        settle(store)


def compact(source: str | Path, target: str | Path) -> EmbeddingStore:
    """Make at `target` a store of the rows of `source` that are done, in their order.

    What failed or was dropped is left out, so later rows have lower numbers. As `copy_rows`, also
    when killed.

    Raises RowsUnavailableError where rows are pending: they would be lost.
    """
    store = open_store(source)
    status = store.status()
    if pending := int(np.count_nonzero(status == RowStatus.PENDING)):
        raise RowsUnavailableError(f"{store.location}: {pending:,} rows are pending; fill it first")
    return copy_rows(store, target, np.flatnonzero(status == RowStatus.DONE))


def _row_numbers(
    store: EmbeddingStore, rows: Iterable[int], *, lowest: int = 0
) -> NDArray[np.int64]:
    numbers = np.asarray(list(rows), np.int64)
    if len(numbers) and not (numbers.min() >= lowest and numbers.max() < store.num_rows):
        raise RowsUnavailableError(f"{store.location} has rows 0 to {store.num_rows - 1}")
    return numbers


def begin_copy(
    store: EmbeddingStore, location: Location, keys: NDArray[np.uint64]
) -> EmbeddingStore:
    """Open, or begin, a store for rows of these keys (uint64 [N]) whose bytes mean what those of
    `store` do. Under the run lock.

    Raises InputError where there is one in which they mean other numbers.
    """
    copy = open_for_writing(location, store.spec, store.provenance, store.meta["versions"][-1])
    prepared = copy.meta.get("prepared", False)
    if prepared and (name := unlike_fit(store, copy)):
        raise InputError(
            f"{location} was filled from other rows: its {name} is not that of {store.location}, "
            "so that its bytes mean other numbers; name a new path"
        )
    copy.match_rows(keys)
    manifest_location(location).remove()
    if not prepared and store.meta.get("prepared", False):
        copy.write_constants({name: store.constant(name) for name in store.spec.constants})
        copy.write_fitted({name: store.fitted(name) for name in store.spec.arrays})
        kept = {key: store.meta[key] for key in ("fitted", "prepared") if key in store.meta}
        copy.update_meta(**kept)
    return copy


def unlike_fit(store: EmbeddingStore, other: EmbeddingStore) -> str | None:
    """By what the same bytes mean other numbers in two stores of one spec, if they do."""
    theirs = _fits(other)
    unlike = (name for name, it in _fits(store).items() if not np.array_equal(it, theirs[name]))
    return next(unlike, None)


def _fits(store: EmbeddingStore) -> dict[str, np.ndarray]:
    """What the stored bytes mean, by name."""
    fits = {name: store.constant(name) for name in store.spec.constants}
    for name in store.spec.arrays:
        fits |= {f"{part} of {name}": value for part, value in store.fitted(name).parts().items()}
    return fits


def _tables(store: EmbeddingStore) -> dict[str, np.ndarray]:
    """Checksums and errors of all rows."""
    arrays = store.spec.arrays.items()
    names = [checksum_name(name) for name, _ in arrays]
    names += [error_name(name) for name, array in arrays if array.codec.is_lossy]
    return {name: store.read_table(name) for name in names}


def link_shard(store: EmbeddingStore, copy: EmbeddingStore, shard: int) -> bool:
    """Give the copy the same files, where both lie on one file system with links; else False.

    Whoever writes a shard replaces it, so neither changes both.
    """
    if not (store.location.is_local and copy.location.is_local):
        return False
    for name in store.spec.arrays:
        path = shard_path(store.spec, name, shard)
        source, target = (s.location.path.joinpath(*path) for s in (store, copy))
        try:
            target.unlink(missing_ok=True)  # of a copy that was killed before it was recorded
            if source.exists():  # one of zeros does not
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(source, target)
        except OSError:
            return False
    return True


def _copy_shard(
    store: EmbeddingStore,
    copy: EmbeddingStore,
    tables: dict[str, np.ndarray],
    shard: int,
    numbers: NDArray[np.int64],
    taken: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Write a shard of the copy: of its rows, numbers int64 [n] in the source, those taken.

    Gives those of `taken` (int64 [k], counted within the shard) that match their checksums.
    """
    order, back = np.unique(numbers[taken], return_inverse=True)
    contents, damaged = {}, set[int]()
    for name, array in store.spec.arrays.items():
        sorted_rows = np.empty((len(order), *array.stored_row_shape), array.codec.dtype)
        sums = tables[checksum_name(name)]
        damaged.update(read_sorted(store, name, order, sums, sorted_rows))
        contents[name] = np.zeros((len(numbers), *array.stored_row_shape), array.codec.dtype)
        contents[name][taken] = sorted_rows[back]
    sound = taken[~np.isin(numbers[taken], list(damaged))]
    here = store.spec.shard_range(shard, store.num_rows)
    unchanged = len(sound) == store.spec.shard_rows and np.array_equal(numbers, here)
    if not (unchanged and link_shard(store, copy, shard)):
        write_shard(copy.location, copy.spec, shard, contents)
    return sound


def _result(
    store: EmbeddingStore,
    tables: dict[str, np.ndarray],
    shard: int,
    numbers: NDArray[np.int64],
    sound: NDArray[np.int64],
) -> ShardResult:
    """What is to be recorded of a shard of the copy whose rows `sound` are there."""
    rows = numbers[sound]
    lossy = [name for name, array in store.spec.arrays.items() if array.codec.is_lossy]
    return ShardResult(
        shard,
        sound,
        np.full(len(sound), RowStatus.DONE, np.uint8),
        {name: tables[checksum_name(name)][rows] for name in store.spec.arrays},
        {name: tables[error_name(name)][rows] for name in lossy},
    )
