"""Fill a store: encode the rows of a table that are not there yet, and nothing else."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cache.checksums import row_keys
from cache.codec import FittedCodec, fit, needs_fitting
from cache.encoding import Roles, ShardTask, encode_shards, sample_values
from cache.layout import StoreSpec, checksum_name, fitted_name
from cache.location import Location, locate
from cache.lock import run_lock
from cache.manifest import manifest_location, measure, settle
from cache.settings import FillingParams, Part
from cache.store import (
    EmbeddingStore,
    RowStatus,
    ShardResult,
    open_for_writing,
    open_store,
    remove_store,
)
from gill_errors import GillError, TasksLostError, UnfitWorkerError

SAMPLE_ROWS = 256  # spread evenly over the table, for codecs that are fitted to the data


DoTasks = Callable[[Iterable[Any], Callable[[Any], None]], None]
"""Does every task, and hands each result to the second argument."""
OnProgress = Callable[[int, int, int], None]
"""Is told how many rows of this run are settled, how many there are, and how many failed."""
OpenCrew = Callable[[Callable[[], Any]], AbstractContextManager[DoTasks]]
"""From what makes the work, in whichever process does it, to who does tasks."""


@dataclass
class FillReport:
    """What a run did. encoded counts rows of this run; skipped those that were settled before."""

    num_rows: int
    done: int
    encoded: int
    skipped: int
    failed: dict[int, str]
    seconds: float
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def rows_per_second(self) -> float:
        """Rows encoded per second of this run; 0 where none was."""
        return self.encoded / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.done:,} of {self.num_rows:,} rows done, {len(self.failed):,} failed; "
            f"this run encoded {self.encoded:,} ({self.rows_per_second:,.0f} rows/s), "
            f"{self.skipped:,} were there"
        ]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  row {row} failed: {why}" for row, why in list(self.failed.items())[:10]]
        if len(self.failed) > 10:
            lines.append(f"  ... and {len(self.failed) - 10:,} more")
        return "\n".join(lines)


class ShardsLostError(GillError, RuntimeError):
    """Some shards could not be done, as their workers died under them; run again."""


def fill(
    where: str | Path,
    rows: Sequence[Any],
    spec: StoreSpec,
    make_roles: Callable[[], Roles],
    *,
    provenance: Mapping[str, Any],
    params: FillingParams | None = None,
    crew: OpenCrew | None = None,
    key: Callable[[Any], str] = str,
    versions: Mapping[str, str] | None = None,
    rebuild: bool = False,
    retry_failed: bool = False,
    progress: OnProgress | None = None,
    part: Part | None = None,
) -> FillReport:
    """Fill the store at `where` from a table: create it, resume it or bring it up to date.

    rows: N rows, handed to `Roles.read`; indexed by numbers and slices.
    key: row -> fingerprint of all that its values are made from.
    crew: opens workers for the shards, as `cluster.Crew` does; None: they are done in this process.
    make_roles: called once in every process that does the work, and not at all where there is no
        work; for processes and clusters a module-level function, or a partial of one.
    provenance: JSON values that must not change under the rows (model, weights, preprocessing).
    versions: library versions: recorded, and never a reason to refuse a store; the workers of a
        cluster must have the same.
    rebuild: remove the store first.
    retry_failed: encode failed rows again.
    part: encode the rows of these shards alone, in a store of their own: `join_stores` makes one of
        such parts, which several machines fill that share no disk. The report counts its rows.

    Raises StoreMismatchError (other provenance or spec), StoreLockedError (another run),
    NotAStoreError (something else is there), WriteFailedError (full disk, read-only),
    ShardsLostError, UnfitWorkerError, and what the crew and the encoder raise.
    Whatever happens, shards that are done stay done.
    """
    location, started = locate(where), time.monotonic()
    spec.check_num_files(len(rows))
    params = params or FillingParams()
    with run_lock(location) as run:
        notes = []
        if rebuild and location.exists():
            remove_store(location)
            notes.append("the old store was removed, as asked (rebuild)")
        store = open_for_writing(location, spec, provenance, versions or {})
        # From here on the status alone says what is to be done.
        notes += store.match_rows(row_keys(map(key, rows)))
        status = store.status()
        if retry_failed:
            failed = np.flatnonzero(status == RowStatus.FAILED)
            store.mark_pending(failed)
            status[failed] = RowStatus.PENDING
        shards = range(spec.num_shards(len(rows)))
        if part is not None:
            shards = part.shards(len(shards))
        mine = range(shards.start * spec.shard_rows, min(shards.stop * spec.shard_rows, len(rows)))
        pending = int(np.count_nonzero(status[mine.start : mine.stop] == RowStatus.PENDING))
        prepared = store.meta.get("prepared", False)
        if pending or not prepared:
            manifest_location(location).remove()  # whatever it says will not be true
            make = partial(_Encoder, location, run, make_roles, params)
            _fill_pending(store, rows, status, shards, pending, make, crew, progress)
        settle(store)
        return FillReport(
            num_rows=len(mine),
            done=int(np.count_nonzero(store.status()[mine.start : mine.stop] == RowStatus.DONE)),
            encoded=pending,
            skipped=len(mine) - pending,
            failed={row: why for row, why in store.failures().items() if row in mine},
            seconds=time.monotonic() - started,
            measured=measure(store),
            notes=notes,
        )


@dataclass(frozen=True)
class _Sample:
    """Rows to encode before the first shard: codecs are fitted to them."""

    rows: list[Any]


class _Encoder:
    """What a process keeps for a run: the open store, and the roles with their models."""

    def __init__(
        self,
        location: Location,
        run: str,
        make_roles: Callable[[], Roles],
        params: FillingParams,
    ) -> None:
        if location.is_local and not location.exists():
            raise UnfitWorkerError(
                f"the worker on {socket.gethostname()} does not see {location}: all machines of a "
                "cluster need the same files under the same path, or a store at an fsspec URL"
            )
        # Opened where the work is done: neither an open store nor a model could travel.
        self._store, self._run, self._params = open_store(location), run, params
        self._roles = make_roles()

    def __call__(self, task: ShardTask | _Sample) -> Any:
        if isinstance(task, _Sample):
            return self.prepare(task.rows)
        # A scheduler hands out shards one by one: only `encode` reads across their borders.
        return next(self.encode([task]))

    def prepare(self, rows: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(values of sample rows, constants), which have to be known before the first shard."""
        constants = dict(self._roles.constants()) if self._roles.constants else {}
        values = sample_values(self._roles, rows, self._params.batch_size) if rows else {}
        return values, constants

    def encode(self, tasks: Iterable[ShardTask]) -> Iterator[ShardResult]:
        """Shards one after another, reading ahead across their borders."""
        return encode_shards(
            self._store,
            self._run,
            tasks,
            self._roles,
            batch_size=self._params.batch_size,
            num_readers=self._params.num_readers,
        )


def _fill_pending(
    store: EmbeddingStore,
    rows: Sequence[Any],
    status: np.ndarray,
    shards: range,
    total: int,
    make: Callable[[], _Encoder],
    crew: OpenCrew | None,
    progress: OnProgress | None,
) -> None:
    """Encode the rows that are pending in these shards, `total` of them."""
    settled, failed = 0, 0

    def commit(result: ShardResult) -> None:
        nonlocal settled, failed
        # The only writer of the tables: workers write shard files alone, and no file has two.
        store.commit(result)
        settled += len(result.positions)
        failed += len(result.reasons)
        if progress:
            progress(settled, total, failed)

    prepared = store.meta.get("prepared", False)
    if crew is None:
        encoder = make()
        if not prepared:
            _prepare(store, encoder.prepare, rows)
        for result in encoder.encode(_tasks(store, rows, status, shards)):
            commit(result)
        return
    try:
        with crew(make) as run:
            if not prepared:
                _prepare(store, partial(_prepare_there, run), rows)
            run(_tasks(store, rows, status, shards), commit)
    except TasksLostError as e:
        raise ShardsLostError(
            f"{store.location}: {total - settled:,} rows are still pending; run again to do them. "
            f"{e}"
        ) from e


def _prepare_there(run: DoTasks, sample: list[Any]) -> Any:
    """What a worker says to the sample."""
    answers: list[Any] = []
    run([_Sample(sample)], answers.append)
    return answers[0]


def _tasks(
    store: EmbeddingStore, rows: Sequence[Any], status: np.ndarray, shards: range
) -> Iterator[ShardTask]:
    """One task per shard with a pending row."""
    # By the status at the start: shards share no row, so none is stale when its turn comes.
    todo = status == RowStatus.PENDING
    sums = {name: store.read_table(checksum_name(name)) for name in store.spec.arrays}
    for shard in shards:
        span = store.spec.shard_range(shard, len(rows))
        here = slice(span.start, span.stop)
        if todo[here].any():
            yield ShardTask(
                shard,
                rows[here],
                todo[here],
                status[here] == RowStatus.DONE,
                {name: values[here] for name, values in sums.items()},
            )


def _prepare(
    store: EmbeddingStore,
    ask: Callable[[list[Any]], tuple[dict[str, Any], dict[str, Any]]],
    rows: Sequence[Any],
) -> None:
    """Fit the codecs that need it, and keep the constants: once in the life of a store."""
    spec = store.spec
    to_fit = {name for name, array in spec.arrays.items() if needs_fitting(array.codec)}
    if to_fit or spec.constants:
        if not len(rows) and to_fit:
            return  # nothing to fit to yet: the first fill with rows prepares the store
        # From the whole table, not its head: tables are often sorted by where rows came from.
        picked = np.unique(np.linspace(0, len(rows) - 1, SAMPLE_ROWS).round().astype(int))
        sample = [rows[int(i)] for i in picked] if to_fit else []
        values, constants = ask(sample)
        store.write_constants(constants)
        fitted: dict[str, FittedCodec] = {
            name: fit(spec.arrays[name].codec, values.get(name, np.zeros((0,)))) for name in to_fit
        }
        store.write_fitted(fitted)
        if to_fit:
            parts = [fitted_name(name, part) for name in fitted for part in fitted[name].parts()]
            store.update_meta(
                fitted=f"{', '.join(sorted(parts))}: fitted to {len(sample)} rows spread evenly "
                f"over the first table of {len(rows)} rows (int8: range of each channel)"
            )
    # Last, and before any shard: killed earlier, the next run fits anew for all rows.
    store.update_meta(prepared=True)
