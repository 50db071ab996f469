"""Shards through three roles: read -> encode -> write, overlapped.

Reading runs in threads ahead of the encoder, encoding in the caller's thread; what was encoded is
cast and checked by the same threads that read, and a shard is written beside the encoding of the
next. Queues are bounded: memory does not grow with the rows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache.checksums import row_checksums
from cache.codec import encode_into
from cache.lock import current_run
from cache.memory import Memory
from cache.shards import write_shard
from cache.store import EmbeddingStore, RowStatus, ShardResult
from gill_errors import InputError, OutOfMemoryError

CASTS_AHEAD = 8  # batches that wait to be cast


class Roles(NamedTuple):
    """What the cache does not know: pictures, captions, models. Made where the work runs.

    read: row -> payload, called from several threads; raises to have the row recorded as failed.
    encode: list of b payloads -> {array name: float [b, *shape]}, called from one thread per shard
        in work; best in the number type to be stored. The arrays are kept for a while: do not write
        into them again. Anything with `shape` and `__array__` will do, and a helper thread calls
        the latter, so that a GPU's next batch need not wait for the numbers of this one. An
        exception ends the run: it is not one row's fault.
    group: payload -> key; only payloads of equal key share a batch (captions of equal length).
    constants: () -> {name: float [*axes]}, the arrays kept once (the empty prompt's embedding).
    """

    read: Callable[[Any], Any]
    encode: Callable[[list[Any]], Mapping[str, np.ndarray]]
    group: Callable[[Any], Hashable] | None = None
    constants: Callable[[], Mapping[str, np.ndarray]] | None = None


@dataclass(frozen=True)
class ShardTask:
    """One shard to do: the unit of work of every scheduler.

    rows: the shard's rows of the table; todo bool [n]: those to encode; kept bool [n]: those that
    are done, and encoded again where they no longer match checksums (uint32 [n] per array). The
    others have failed, and stay so.
    """

    shard: int
    rows: Sequence[Any]
    todo: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    checksums: dict[str, NDArray[np.uint32]]


Reads: TypeAlias = tuple[list[int], Future[list[Any]]] | None
"""Positions in a shard, and their payloads on the way; None: the shard has no more."""


class SupersededRunError(RuntimeError):
    """The run that handed out this shard is over, or another one holds the store."""


def encode_shards(
    store: EmbeddingStore,
    run: str,
    tasks: Iterable[ShardTask],
    roles: Roles,
    *,
    batch_size: int,
    num_readers: int | None,
) -> Iterator[ShardResult]:
    """Encode and write shards; yields each result once its files are in place, in order.

    num_readers: threads; None: as many as there are cores for this process.
    """
    num_readers = num_readers or len(os.sched_getaffinity(0))
    helping = ThreadPoolExecutor(num_readers, "cache-read")
    writing = ThreadPoolExecutor(1, "cache-write")
    drafts = _drafts(store, tasks, helping)
    ahead: deque[tuple[_Draft, Reads]] = deque()
    written: deque[Future[ShardResult]] = deque()
    # Two batches ahead, across the borders of shards, and no more however long the table. Handing a
    # job to a thread costs 20 us, so that one reads several rows; each reader has four jobs ahead.
    rows_ahead = max(2 * batch_size, 2 * num_readers)
    rows_a_job = max(1, rows_ahead // (4 * num_readers))
    # None after the rows of a shard: there its last groups are encoded and it is written.
    jobs = ((draft, job) for draft in drafts for job in [*_jobs(draft.positions, rows_a_job), None])
    try:
        exhausted = False
        while not exhausted or ahead:
            while not exhausted and len(ahead) < rows_ahead // rows_a_job:
                draft, positions = next(jobs, (None, None))
                if draft is None:
                    exhausted = True
                elif positions is None:
                    ahead.append((draft, None))
                else:
                    rows = [draft.task.rows[position] for position in positions]
                    ahead.append((draft, (positions, helping.submit(_read, roles.read, rows))))
            if not ahead:
                break
            # Reported as soon as it lies there: only then does it count as done.
            if written and written[0].done():
                yield written.popleft().result()
            draft, reads = ahead.popleft()
            if reads is not None:
                positions, payloads = reads
                for position, payload in zip(positions, payloads.result()):
                    _take(draft, position, payload, roles, batch_size)
                continue
            for group in list(draft.waiting):  # the end of a shard
                _encode_batch(draft, group, roles)
            while written:  # at most one shard waits to be written
                yield written.popleft().result()
            written.append(writing.submit(_write, store, run, draft))
        while written:
            yield written.popleft().result()
    except (Exception, KeyboardInterrupt):
        while written:  # a shard that is being written is not lost with the one that failed
            yield written.popleft().result()
        raise
    finally:
        helping.shutdown(wait=False, cancel_futures=True)
        writing.shutdown(wait=True, cancel_futures=True)


def sample_values(roles: Roles, rows: Sequence[Any], batch_size: int) -> dict[str, np.ndarray]:
    """Encode a few rows and store nothing: {array: float32 [n, *shape]}, less unreadable rows."""
    batches: dict[Hashable, list[Any]] = {}
    for row in rows:
        try:
            payload = roles.read(row)
        except MemoryError as error:
            raise _out_of_memory("a sample row") from error
        except Exception:  # it will be recorded as failed when its shard is done
            continue
        batches.setdefault(roles.group(payload) if roles.group else None, []).append(payload)
    values: dict[str, list[np.ndarray]] = {}
    for payloads in batches.values():
        for start in range(0, len(payloads), batch_size):
            for name, array in roles.encode(payloads[start : start + batch_size]).items():
                values.setdefault(name, []).append(np.asarray(array, np.float32))
    return {name: np.concatenate(parts) for name, parts in values.items()}


@dataclass
class _Draft:
    """A shard being made."""

    task: ShardTask
    store: EmbeddingStore
    helping: ThreadPoolExecutor
    positions: NDArray[np.int64]
    stored: dict[str, np.ndarray]
    checksums: dict[str, NDArray[np.uint32]]
    errors: dict[str, NDArray[np.float32]]
    reasons: dict[int, str] = field(default_factory=dict)
    waiting: dict[Hashable, list[tuple[int, Any]]] = field(default_factory=dict)
    casts: deque[Future[None]] = field(default_factory=deque)


def _drafts(
    store: EmbeddingStore, tasks: Iterable[ShardTask], helping: ThreadPoolExecutor
) -> Iterator[_Draft]:
    memory = {
        name: Memory(array.stored_row_shape, np.dtype(array.codec.dtype))
        for name, array in store.spec.arrays.items()
    }
    for task in tasks:
        n, todo = len(task.rows), task.todo.copy()
        start = task.shard * store.spec.shard_rows
        stored, checksums, errors = {}, {}, {}
        for name, array in store.spec.arrays.items():
            stored[name] = memory[name].empty(n)
            checksums[name] = np.zeros(n, np.uint32)
            if array.codec.is_lossy:
                errors[name] = np.zeros(n, np.float32)
            # A shard is written whole, so rows that stay are read back; those that no longer match
            # their checksums join the ones to do.
            if not task.todo.all():
                sums = task.checksums[name]
                bad = store.read_checked(name, start, sums, task.kept, stored[name])
                todo[list(bad)] = True
        positions = np.flatnonzero(todo)
        yield _Draft(task, store, helping, positions, stored, checksums, errors)


def _jobs(positions: NDArray[np.int64], size: int) -> Iterator[list[int]]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size].tolist()


def _read(read: Callable[[Any], Any], rows: Sequence[Any]) -> list[Any]:
    """The payload of every row, or the exception that it raised."""
    payloads = []
    for row in rows:
        try:
            payloads.append(read(row))
        except Exception as error:
            payloads.append(error)
    return payloads


def _take(draft: _Draft, position: int, payload: Any, roles: Roles, batch_size: int) -> None:
    try:
        if isinstance(payload, Exception):
            raise payload
        key = roles.group(payload) if roles.group else None
    except MemoryError as error:
        row = position + draft.task.shard * draft.store.spec.shard_rows
        raise _out_of_memory(f"row {row} of {draft.store.location}") from error
    except Exception as e:
        draft.reasons[position] = f"{type(e).__name__}: {e}"
        return
    waiting = draft.waiting.setdefault(key, [])
    waiting.append((position, payload))
    if len(waiting) == batch_size:
        _encode_batch(draft, key, roles)


def _out_of_memory(what: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"not enough memory to read {what}: set run.readers or run.workers lower, or for large "
        "pictures captions.max_pixels; what is written stays, and the next run goes on from it"
    )


def _encode_batch(draft: _Draft, group: Hashable, roles: Roles) -> None:
    positions, payloads = zip(*draft.waiting.pop(group))
    index = np.array(positions)
    try:
        values = roles.encode(list(payloads))
    except Exception as e:
        rows = index + draft.task.shard * draft.store.spec.shard_rows
        e.add_note(f"while encoding rows {rows.min()} to {rows.max()} of {draft.store.location}")
        raise
    for name, array in draft.store.spec.arrays.items():
        expected = (len(payloads), *array.shape)
        # Not looked at here: numbers may still be on their way from a GPU.
        found = np.shape(values[name]) if name in values else "nothing"
        if found != expected:
            raise InputError(f"encode: expected {name!r} of shape {expected}, got {found}")
        draft.casts.append(draft.helping.submit(_cast, draft, name, index, values[name]))
    # Each holds what the encoder gave; errors of a cast come up here as well.
    while len(draft.casts) > CASTS_AHEAD:
        draft.casts.popleft().result()


def _cast(draft: _Draft, name: str, index: NDArray[np.int64], values: ArrayLike) -> None:
    # Into the shard itself. Other casts write other rows: no lock.
    rows = [draft.stored[name][position] for position in index]
    error, refused = encode_into(draft.store.fitted(name), np.asarray(values), rows)
    # While the rows are in the processor's cache, and not in the one thread that writes.
    draft.checksums[name][index] = row_checksums(draft.stored[name], index.tolist())
    if name in draft.errors:
        draft.errors[name][index] = error
    for i, reason in refused.items():
        # Of several arrays the first that refuses the row names the reason.
        draft.reasons.setdefault(int(index[i]), f"{name}: {reason}")


def _write(store: EmbeddingStore, run: str, draft: _Draft) -> ShardResult:
    """Put the shard's files in place and say what is in them. Row status: the coordinator's."""
    shard, positions = draft.task.shard, draft.positions
    for cast in draft.casts:
        cast.result()
    failed = list(draft.reasons)
    for name, stored in draft.stored.items():
        stored[failed] = 0
        draft.checksums[name][failed] = row_checksums(stored, failed)
    # Asked as late as can be. A worker whose run was given up must not overwrite what the next run
    # wrote, perhaps from another table.
    if current_run(store.location) != run:
        raise SupersededRunError(f"{store.location}: shard {shard} is not written, its run is over")
    write_shard(store.location, store.spec, shard, draft.stored)
    # Only rows of `positions` are reported: those that were kept keep their status.
    status = np.full(len(draft.task.rows), RowStatus.DONE, np.uint8)
    status[failed] = RowStatus.FAILED
    checksums = {name: sums[positions] for name, sums in draft.checksums.items()}
    errors = {name: error[positions] for name, error in draft.errors.items()}
    return ShardResult(shard, positions, status[positions], checksums, errors, draft.reasons)
