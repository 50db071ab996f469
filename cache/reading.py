"""Reading rows back: by number, in order, or shuffled for training.

Shuffled reading is in two levels, so that storage sees large reads only: the order of blocks (runs
of consecutive rows), then a buffer of several blocks whose rows are mixed. The order depends on
(seed, epoch, rank, world_size) alone, and can be entered at any step.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cache.codec import decode
from cache.layout import checksum_name
from cache.store import EmbeddingStore, RowStatus, open_store


class ReadingParams(BaseModel):
    """How shuffled rows are read. block_rows and buffer_rows are part of the order of an epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_rows: int = Field(
        default=128, ge=1, description="Consecutive rows that are read at once."
    )
    buffer_rows: int = Field(
        default=2048, ge=1, description="Rows that are mixed in memory; two such buffers are held."
    )
    prefetch: int = Field(default=2, ge=1, description="Batches made ahead of the consumer.")
    on_damage: Literal["stop", "skip"] = Field(
        default="stop",
        description="A row that fails its checksum: stop, naming its shard; or skip and report.",
    )


class Batch(NamedTuple):
    """rows int64 [B]: row numbers; arrays: name -> [B, *shape], float16 or float32 as stored."""

    rows: NDArray[np.int64]
    arrays: dict[str, np.ndarray]


class RowsUnavailableError(LookupError):
    """Rows were asked for that are pending or failed, or do not exist."""


class DamagedRowsError(RuntimeError):
    """Stored rows do not match their checksums."""


class StoresDifferError(ValueError):
    """Stores that should hold the same rows do not."""


Source = tuple[str | Path | EmbeddingStore, str]


def read_rows(
    where: str | Path | EmbeddingStore, rows: Iterable[int], names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Rows by number, in the order asked for: {array: [n, *shape]}, checked against their
    checksums.

    Raises RowsUnavailableError or DamagedRowsError, naming rows and files.
    """
    store = _opened(where)
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
        if damaged := _read_sorted(store, name, order, table, stored):
            raise DamagedRowsError(_damage_report(store, name, damaged))
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
    store = _opened(where)
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


class ShuffledRows:
    """Shuffled batches over one or several stores with the same rows.

    for batch in ShuffledRows({"pooled": ("features.zarr", "pooled"),
                               "embedding": ("targets.zarr", "embedding")}, batch_size=200, seed=0):
        batch.rows  # int64 [B];  batch.arrays["pooled"]  # [B, d]

    Iterating gives the rest of the current epoch and then moves to the next; `state_dict` is
    (epoch, step), and after `load_state_dict` iteration goes on exactly there. Over all ranks,
    every row of `subset` (default: all) that is done in all stores comes exactly once per epoch;
    failed rows are left out and counted (`num_failed`). All ranks take the same number of steps;
    the last batch is shorter, and may be empty on some ranks: `drop_last` leaves it out.

    Raises StoresDifferError where the stores hold different rows, RowsUnavailableError where rows
    are pending, and DamagedRowsError in the middle of an epoch (unless on_damage is "skip": then
    see `damaged`).
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        subset: Iterable[int] | None = None,
        drop_last: bool = False,
        params: ReadingParams | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below world_size {world_size}")
        opened: dict[str, EmbeddingStore] = {}
        self._sources: dict[str, tuple[EmbeddingStore, str]] = {}
        for output, (where, name) in sources.items():
            store = _opened(opened.get(str(where), where))
            opened[str(where)] = store
            store.array_spec(name)
            self._sources[output] = (store, name)
        stores = list(opened.values())
        _check_same_rows(stores)
        self.batch_size, self.seed = batch_size, seed
        self.params = params = params or ReadingParams()
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self._rows, self.num_failed = _usable_rows(stores, subset)
        self._checksums = {
            output: store.read_table(checksum_name(name))
            for output, (store, name) in self._sources.items()
        }
        starts = np.flatnonzero(np.diff(self._rows // params.block_rows, prepend=-1))
        ends = np.append(starts[1:], len(self._rows))[: len(starts)]
        self._blocks = np.stack([starts, ends], axis=1)  # [num_blocks, 2], into self._rows
        self.damaged: dict[int, str] = {}
        self.epoch, self.step = 0, 0

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        return len(self._rows)

    def __len__(self) -> int:
        """Steps of an epoch: the same on every rank."""
        if self.drop_last:
            return self.num_rows // self.world_size // self.batch_size
        return math.ceil(math.ceil(self.num_rows / self.world_size) / self.batch_size)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> Self:
        self.epoch, self.step = state["epoch"], state["step"]
        return self

    def __iter__(self) -> Iterator[Batch]:
        windows = self._plan(self.epoch)
        first = self.step
        for batch in _in_background(lambda: self._batches(windows, first), self.params.prefetch):
            self.step += 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def order(self, epoch: int) -> NDArray[np.int64]:
        """This rank's rows of an epoch in the order they come: int64. Reads no data."""
        parts = [window.rows[window.permutation] for window in self._plan(epoch)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _plan(self, epoch: int) -> list[_Window]:
        """This rank's windows of an epoch: which rows are in memory together, and their order."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self._blocks))
        # Each rank takes an equal piece of the sequence of all blocks, cutting a block where need
        # be.
        low = self.num_rows * self.rank // self.world_size
        high = self.num_rows * (self.rank + 1) // self.world_size
        windows: list[_Window] = []
        pieces: list[NDArray[np.int64]] = []
        begin = 0
        for first, last in self._blocks[shuffled]:
            piece = self._rows[first:last][max(0, low - begin) : max(0, high - begin)]
            begin += last - first
            if len(piece) == 0:
                continue
            if pieces and sum(map(len, pieces)) + len(piece) > self.params.buffer_rows:
                windows.append(self._window(pieces, epoch, len(windows)))
                pieces = []
            pieces.append(piece)
        if pieces:
            windows.append(self._window(pieces, epoch, len(windows)))
        return windows

    def _window(self, pieces: list[NDArray[np.int64]], epoch: int, number: int) -> _Window:
        rng = np.random.default_rng([self.seed, epoch, self.rank, number])
        return _Window(pieces, np.concatenate(pieces), rng.permutation(sum(map(len, pieces))))

    def _batches(self, windows: list[_Window], first: int) -> Iterator[Batch]:
        """Batches from step `first` on."""
        begins = np.cumsum([0, *(len(window.rows) for window in windows)])
        position = min(first * self.batch_size, int(begins[-1]))
        entered = int(np.searchsorted(begins[1:], position, side="right"))
        with ThreadPoolExecutor(1, "cache-read") as pool:
            loaded = self._loaded(windows[entered:], pool)
            left = np.zeros(
                0, np.int64
            )  # offsets in the current buffer that are not handed out yet
            for step in range(first, len(self)):
                missing = max(0, min(self.batch_size, int(begins[-1]) - step * self.batch_size))
                batch, filled = self._empty_batch(missing), 0
                while missing:
                    if len(left) == 0:
                        current = next(loaded)
                        left = current.window.permutation
                        if step == first and filled == 0:
                            left = left[position - begins[entered] :]
                    now, left = left[:missing], left[missing:]
                    missing -= len(now)
                    filled += self._copy(current, now[~current.damaged[now]], batch, filled)
                yield Batch(
                    batch.rows[:filled], {name: a[:filled] for name, a in batch.arrays.items()}
                )

    def _loaded(self, windows: list[_Window], pool: ThreadPoolExecutor) -> Iterator[_Loaded]:
        """Windows with their data, the next one being read while one is in use: two in memory."""
        capacity = max((len(window.rows) for window in windows), default=0)
        buffers = [
            {
                output: np.empty(
                    (capacity, *store.array_spec(name).stored_row_shape),
                    store.array_spec(name).codec.dtype,
                )
                for output, (store, name) in self._sources.items()
            }
            for _ in windows[:2]
        ]
        ahead = [pool.submit(self._load, window, buffers[0]) for window in windows[:1]]
        for i in range(len(windows)):
            current = ahead.pop().result()
            if i + 1 < len(windows):
                ahead.append(pool.submit(self._load, windows[i + 1], buffers[(i + 1) % 2]))
            yield current

    def _load(self, window: _Window, buffers: dict[str, np.ndarray]) -> _Loaded:
        damaged = np.zeros(len(window.rows), bool)
        for output, (store, name) in self._sources.items():
            at = 0
            for rows in window.pieces:
                into = buffers[output][at : at + len(rows)]
                bad = _read_sorted(store, name, rows, self._checksums[output], into)
                if bad and self.params.on_damage == "stop":
                    raise DamagedRowsError(_damage_report(store, name, bad))
                damaged[at + np.searchsorted(rows, list(bad))] = True
                self.damaged.update(bad)
                at += len(rows)
        return _Loaded(window, buffers, damaged)

    def _empty_batch(self, length: int) -> Batch:
        arrays = {}
        for output, (store, name) in self._sources.items():
            shape = (length, *store.array_spec(name).shape)
            arrays[output] = np.empty(shape, store.fitted(name).decoded_dtype)
        return Batch(np.empty(length, np.int64), arrays)

    def _copy(self, loaded: _Loaded, offsets: NDArray[np.int64], batch: Batch, at: int) -> int:
        """Decode rows of a buffer into a batch, from its row `at` on; returns how many."""
        end = at + len(offsets)
        batch.rows[at:end] = loaded.window.rows[offsets]
        for output, (store, name) in self._sources.items():
            into = batch.arrays[output][at:end]
            decode(store.fitted(name), loaded.buffers[output], offsets, into)
        return len(offsets)


class _Window(NamedTuple):
    """Rows that are in memory together: pieces of consecutive blocks, and the order they leave
    in."""

    pieces: list[NDArray[np.int64]]
    rows: NDArray[np.int64]
    permutation: NDArray[np.int64]


class _Loaded(NamedTuple):
    """A window whose rows are in buffers {output: [capacity, *stored_row_shape]}."""

    window: _Window
    buffers: dict[str, np.ndarray]
    damaged: NDArray[np.bool_]


def _opened(where: str | Path | EmbeddingStore) -> EmbeddingStore:
    return where if isinstance(where, EmbeddingStore) else open_store(where)


def _check_same_rows(stores: Sequence[EmbeddingStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        if first.num_rows != other.num_rows:
            raise StoresDifferError(
                f"{first.location} has {first.num_rows:,} rows, {other.location} {other.num_rows:,}: "
                "fill both from one table"
            )
        if first.meta["rows_fingerprint"] != other.meta["rows_fingerprint"]:
            keys, others = first.read_table("row_key"), other.read_table("row_key")
            row = int(np.flatnonzero(keys != others)[0])
            raise StoresDifferError(
                f"{first.location} and {other.location} hold different rows, from row {row} on: "
                "fill both from one table"
            )


def _usable_rows(
    stores: Sequence[EmbeddingStore], subset: Iterable[int] | None
) -> tuple[NDArray[np.int64], int]:
    """(sorted rows that are done in all stores, number of failed ones left out)."""
    rows = np.arange(stores[0].num_rows)
    if subset is not None:
        rows = np.unique(np.asarray(list(subset), np.int64))
        if len(rows) and not (rows[0] >= 0 and rows[-1] < stores[0].num_rows):
            raise RowsUnavailableError(
                f"the subset names rows {rows[0]} to {rows[-1]}; {stores[0].location} has "
                f"{stores[0].num_rows:,}"
            )
    usable = np.ones(len(rows), bool)
    for store in stores:
        status = store.status()[rows]
        if pending := int(np.count_nonzero(status == RowStatus.PENDING)):
            raise RowsUnavailableError(
                f"{store.location}: {pending:,} rows are pending; run the stage that fills it first"
            )
        usable &= status == RowStatus.DONE
    return rows[usable], int(np.count_nonzero(~usable))


def _read_sorted(
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


def _damage_report(store: EmbeddingStore, name: str, damaged: Mapping[int, str]) -> str:
    row, reason = next(iter(damaged.items()))
    more = f" and {len(damaged) - 1:,} more rows near it" if len(damaged) > 1 else ""
    return (
        f"{store.shard_file(name, row)} (shard {row // store.spec.shard_rows}): row {row}{more}: "
        f"{reason}. Verify and repair the store, then fill it again."
    )


def _in_background(make: Callable[[], Iterator[Batch]], depth: int) -> Iterator[Batch]:
    """The items of an iterator that runs in a thread, at most `depth` ahead."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def pull() -> None:
        try:
            for item in make():
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as e:
            put(e)

    thread = threading.Thread(target=pull, name="cache-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
