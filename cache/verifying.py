"""Check a store against its checksums, and make what is bad ready to be done again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cache.layout import bookkeeping, checksum_name
from cache.location import locate
from cache.lock import run_lock
from cache.manifest import make_manifest, manifest_location, read_manifest
from cache.store import EmbeddingStore, NotAStoreError, RowStatus, open_store
from gill_files import explained

READ_ROWS = 256


@dataclass(frozen=True)
class BadShard:
    """A shard file with rows that are not what was written: rows: row number -> what is wrong."""

    array: str
    shard: int
    file: str
    rows: dict[int, str]

    def __str__(self) -> str:
        numbers = sorted(self.rows)
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return (
            f"{self.file} (shard {self.shard}): {len(numbers):,} bad rows ({shown}): "
            f"{self.rows[numbers[0]]}"
        )


@dataclass
class VerifyReport:
    """What a verification found. damaged_tables: bookkeeping array -> row ranges without a reading.

    manifest: how the manifest beside the store differs from the store; one that is missing is no
    damage (a store in the making has none).
    """

    location: str
    num_rows: int
    checked: int = 0
    bad_shards: list[BadShard] = field(default_factory=list)
    damaged_tables: dict[str, list[range]] = field(default_factory=dict)
    manifest: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything is what was written."""
        return not (self.bad_shards or self.damaged_tables or self.manifest)

    @property
    def bad_rows(self) -> list[int]:
        """All bad rows of all arrays, and the rows whose bookkeeping is lost; ascending."""
        rows = {row for bad in self.bad_shards for row in bad.rows}
        for ranges in self.damaged_tables.values():
            rows.update(*ranges)
        return sorted(rows)

    def __str__(self) -> str:
        if self.ok:
            return f"{self.location}: sound; {self.checked:,} stored rows match their checksums"
        lines = [f"{self.location}: DAMAGED; {self.checked:,} stored rows were checked"]
        for table, ranges in self.damaged_tables.items():
            lines += [f"  {table}: rows {r.start} to {r.stop - 1} cannot be read" for r in ranges]
        return "\n".join(lines + [f"  {line}" for line in [*self.bad_shards, *self.manifest]])


def verify(where: str | Path, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read everything again and compare it with the checksums; writes nothing.

    progress: is told how many values were read, and how many there are.

    Names every shard file and row that differs, bookkeeping that cannot be read, and shards whose
    content is not what the manifest says.
    """
    store = open_store(where)
    report = VerifyReport(str(store.location), store.num_rows)
    report.damaged_tables = _damaged_tables(store)
    if report.damaged_tables:
        return report  # without it nothing can be said about rows: repair first, then verify again
    done = store.status() == RowStatus.DONE
    total = int(done.sum()) * len(store.spec.arrays)
    for name, array in store.spec.arrays.items():
        sums = store.read_table(checksum_name(name))
        buffer = np.empty((READ_ROWS, *array.stored_row_shape), array.codec.dtype)
        for shard in range(store.spec.num_shards(store.num_rows)):
            rows, bad = store.spec.shard_range(shard, store.num_rows), {}
            for start in range(rows.start, rows.stop, READ_ROWS):
                stop = min(start + READ_ROWS, rows.stop)
                wanted = done[start:stop]
                if not wanted.any():
                    continue
                found = store.read_checked(
                    name, start, sums[start:stop], wanted, buffer[: stop - start]
                )
                bad.update({start + offset: reason for offset, reason in found.items()})
                report.checked += int(wanted.sum())
                if progress:
                    progress(report.checked, total)
            if bad:
                file = store.shard_file(name, rows.start)
                report.bad_shards.append(BadShard(name, shard, file, bad))
    report.manifest = _manifest_differences(store)
    return report


def repair(where: str | Path, report: VerifyReport | None = None) -> VerifyReport:
    """Make what is bad pending, so that the next `fill` encodes it again, and nothing else.

    report: what `verify` found; it is run here where there is none. Bookkeeping that cannot be read
    is dropped, and its rows are done again. Returns the report that was acted on.
    """
    location = locate(where)
    with run_lock(location):
        report = report or verify(where)
        if not report.ok:
            store = open_store(where, writable=True)
            for name, ranges in report.damaged_tables.items():
                table = store.table(name)
                for span in ranges:
                    # A chunk that is not there reads as zeros, and zero is PENDING.
                    chunk = str(span.start // table.chunks[0])
                    location.remove(name, "c", chunk, *["0"] * (table.ndim - 1))
            rows = np.array(report.bad_rows, np.int64)
            store.mark_pending(rows)
            with explained(location):
                manifest_location(location).remove()
    return report


def _damaged_tables(store: EmbeddingStore) -> dict[str, list[range]]:
    """Bookkeeping chunks that cannot be read, as row ranges per array."""
    damaged: dict[str, list[range]] = {}
    for name in bookkeeping(store.spec):
        table = store.table(name)
        if table.shape[0] != store.num_rows:
            raise NotAStoreError(
                f"{store.location}: {name} has {table.shape[0]} rows, not {store.num_rows}: "
                "a fill was interrupted; run it again"
            )
        # Chunk by chunk: a damaged one costs its rows and no others.
        for start in range(0, table.shape[0], table.chunks[0]):
            span = range(start, min(start + table.chunks[0], table.shape[0]))
            try:
                table[span.start : span.stop]
            except Exception:
                damaged.setdefault(name, []).append(span)
    return damaged


def _manifest_differences(store: EmbeddingStore) -> list[str]:
    try:
        stated = read_manifest(store.location)
    except FileNotFoundError:
        return []
    where, actual = manifest_location(store.location), make_manifest(store)
    differences = []
    for name, digests in actual["shards"].items():
        stated_digests = stated["shards"].get(name, [])
        for shard in range(max(len(digests), len(stated_digests))):
            if digests[shard : shard + 1] != stated_digests[shard : shard + 1]:
                differences.append(f"{where}: shard {shard} of {name} is another one")
    keys = ("num_rows", "status", "rows_fingerprint", "content", "spec", "provenance")
    differences += [f"{where}: {key} differs" for key in keys if stated[key] != actual[key]]
    return differences
