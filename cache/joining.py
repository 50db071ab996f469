"""One store of parts that several machines filled, each on a disk of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.copying import begin_copy, link_shard, unlike_fit
from cache.layout import bookkeeping, checksum_name
from cache.location import locate
from cache.lock import run_lock
from cache.manifest import settle
from cache.reading import DamagedRowsError, damage_report
from cache.shards import write_shard
from cache.store import EmbeddingStore, RowStatus, StoreMismatchError, open_store
from gill_errors import InputError
from gill_records import differences


class PartsError(InputError):
    """Parts do not make one store: a shard is missing, doubled or unfinished, or they differ."""


def join_stores(
    parts: Sequence[str | Path],
    target: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> EmbeddingStore:
    """Make at `target` the store that one machine would have made, of parts by `fill(part=...)`.

    Every shard is read and compared with its checksums before it counts; on one disk it becomes a
    hard link. Parts and target may be folders or URLs. Killed and called again, it goes on.

    progress: is told how many shards are there, and how many there are.

    Raises PartsError naming the first shard that is missing, doubled or unfinished and the parts,
    before anything is written; DamagedRowsError; and what `fill` raises of a target that is another
    store or is being written.
    """
    location = locate(target)
    stores = [open_store(part) for part in parts]
    if not stores:
        raise PartsError("there are no parts to join: name them")
    if location in [store.location for store in stores]:
        raise PartsError(f"{location}: a store cannot be joined onto itself; name another path")
    first, *others = stores
    keys = first.read_table("row_key")
    for store in stores:
        _refuse_unfit(store, first, keys)
    settled = [store.status() != RowStatus.PENDING for store in stores]
    holders = [_holder(stores, settled, shard) for shard in range(first.spec.num_shards(len(keys)))]
    with run_lock(location):
        if location.exists():
            _refuse_other_rows(open_store(location), keys)
        joined = begin_copy(first, location, keys)
        versions = joined.meta["versions"]
        theirs = [version for store in others for version in store.meta["versions"]]
        joined.update_meta(versions=_each_once([*versions, *theirs]))
        there = joined.status() != RowStatus.PENDING
        tables: dict[str, np.ndarray] = {}
        for shard, store in enumerate(holders):
            if shard == 0 or store is not holders[shard - 1]:
                tables = {name: store.read_table(name) for name in bookkeeping(store.spec)}
            span = store.spec.shard_range(shard, len(keys))
            if there[span.start : span.stop].all():
                _refuse_other_shard(store, joined, shard)
            else:
                _take_shard(store, joined, shard, tables)
            if progress:
                progress(shard + 1, len(holders))
        settle(joined)
    return joined


def _refuse_unfit(store: EmbeddingStore, first: EmbeddingStore, keys: NDArray[np.uint64]) -> None:
    """A part of another store than the first is, or one that was never begun."""
    if not store.meta.get("prepared", False):
        raise PartsError(f"{store.location} holds no shard yet: fill it first")
    names = f"{first.location} and {store.location}"
    for what in ("spec", "provenance"):
        for key, one, other in differences(first.meta[what], store.meta[what]):
            raise PartsError(f"{names} are no parts of one store: {key} is {one!r} and {other!r}")
    other_keys = store.read_table("row_key")
    if not np.array_equal(keys, other_keys):
        shorter = min(len(keys), len(other_keys))
        unlike = np.flatnonzero(keys[:shorter] != other_keys[:shorter])
        row = int(unlike[0]) if len(unlike) else shorter
        raise PartsError(
            f"{names} are no parts of one store: their rows differ from row {row} on; fill both "
            "from one table"
        )
    if name := unlike_fit(first, store):
        raise PartsError(
            f"{names} are no parts of one store: they have another {name}, so that equal bytes "
            "mean other numbers; fill all parts on machines of one kind, or store float16 without "
            "a shared first position"
        )


def _holder(
    stores: Sequence[EmbeddingStore], settled: Sequence[NDArray[np.bool_]], shard: int
) -> EmbeddingStore:
    """The part that has a shard. settled bool [N] of each: the rows that are not pending."""
    span = stores[0].spec.shard_range(shard, len(settled[0]))
    rows = f"shard {shard} (rows {span.start} to {span.stop - 1})"
    here = [rows_done[span.start : span.stop] for rows_done in settled]
    having = [number for number, rows_done in enumerate(here) if rows_done.any()]
    if not having:
        raise PartsError(f"no part has {rows}: name the part that has it, or fill it")
    if len(having) > 1:
        both = " and ".join(str(stores[number].location) for number in having[:2])
        raise PartsError(f"{rows} is in both {both}: leave one out")
    [number] = having
    if pending := int(np.count_nonzero(~here[number])):
        raise PartsError(
            f"{rows} is unfinished in {stores[number].location}, {pending:,} rows are pending: run "
            "what fills that part again"
        )
    return stores[number]


def _refuse_other_rows(target: EmbeddingStore, keys: NDArray[np.uint64]) -> None:
    there = target.read_table("row_key") if target.num_rows else keys
    if not np.array_equal(there, keys):
        raise StoreMismatchError(
            f"{target.location} holds other rows and is left as it is: name another path"
        )


def _refuse_other_shard(store: EmbeddingStore, joined: EmbeddingStore, shard: int) -> None:
    """A shard that is there already is of an earlier call, or else stays."""
    span = store.spec.shard_range(shard, joined.num_rows)
    for name in [*map(checksum_name, store.spec.arrays), "row_status"]:
        here, there = (s.table(name)[span.start : span.stop] for s in (joined, store))
        if not np.array_equal(np.asarray(here), np.asarray(there)):
            raise PartsError(
                f"{joined.location} has another shard {shard} than {store.location}: name another "
                "path for the joined store"
            )


def _take_shard(
    store: EmbeddingStore, joined: EmbeddingStore, shard: int, tables: dict[str, np.ndarray]
) -> None:
    """Put a verified shard in place, and then record its rows."""
    span = store.spec.shard_range(shard, joined.num_rows)
    mine = {name: values[span.start : span.stop] for name, values in tables.items()}
    contents = {}
    for name, array in store.spec.arrays.items():
        contents[name] = np.empty((len(span), *array.stored_row_shape), array.codec.dtype)
        done = mine["row_status"] == RowStatus.DONE
        sums = mine[checksum_name(name)]
        if bad := store.read_checked(name, span.start, sums, done, contents[name]):
            bad = {span.start + offset: reason for offset, reason in bad.items()}
            raise DamagedRowsError(damage_report(store, name, bad))
    if not link_shard(store, joined, shard):
        write_shard(joined.location, joined.spec, shard, contents)
    if not (mine["row_status"] == RowStatus.FAILED).any():
        del mine["row_reason"]
    del mine["row_key"]  # there since `begin_copy`
    joined.record(np.arange(span.start, span.stop), mine)


def _each_once(items: Sequence[Any]) -> list[Any]:
    return [item for place, item in enumerate(items) if item not in items[:place]]
