"""Shuffled batches over one or several stores with the same rows."""

from __future__ import annotations

import math
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache.epoch_order import Share, Window, plan_epoch
from cache.fetch_ahead import fetched_ahead, fetchers
from cache.local_copies import local_copies
from cache.location import Location
from cache.reading import Batch, DamagedRowsError, RowsUnavailableError, damage_report
from cache.row_sources import RowSource, row_source
from cache.settings import ReadingParams
from cache.store import EmbeddingStore, RowStatus, open_store
from gill_errors import InputError

Item = TypeVar("Item")


class StoresDifferError(InputError):
    """Stores that should hold the same rows do not."""


class ShuffledRows:
    """Shuffled batches over one or several stores with the same rows.

    for batch in ShuffledRows({"pooled": ("features.zarr", "pooled"),
                               "embedding": ("targets.zarr", "embedding")}, batch_size=200, seed=0):
        batch.rows  # int64 [B];  batch.arrays["pooled"]  # [B, d]

    `batch_size` counts the rows of all ranks. Which rows a step has, and in which order, depends on
    (seed, epoch), the batch size, the subset and the params alone; each rank takes an equal stretch
    of them, in the order of ranks. Iterating gives the rest of the current epoch and then moves to
    the next; `state_dict` is (epoch, step, batch_size), and after `load_state_dict` any number of
    ranks goes on exactly there.

    Over all ranks, every row of `subset` (default: all) that is done in all stores comes exactly
    once per epoch; failed rows are left out and counted (`num_failed`). All ranks take the same
    number of steps; the last batch is shorter, and may be empty on some ranks: `drop_last` leaves
    it out. Of several workers of one rank (`TorchRows`), each makes every num_workers-th batch. One
    iteration at a time: the next one ends one that was left half-way.

    Raises StoresDifferError where the stores hold different rows, RowsUnavailableError where rows
    are pending, and DamagedRowsError in the middle of an epoch (with on_damage="skip" such rows
    are left out of their batch and collected in `damaged`: row -> what is wrong).
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[str | Path | Location | EmbeddingStore, str]],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        worker: int = 0,
        num_workers: int = 1,
        subset: Iterable[int] | None = None,
        drop_last: bool = False,
        params: ReadingParams | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not below world_size {world_size}")
        self.params = params or ReadingParams()
        self._copies = local_copies(self.params)
        stores: dict[str, EmbeddingStore] = {}
        self._sources: dict[str, RowSource] = {}
        for output, (where, name) in sources.items():
            store = stores.setdefault(str(where), open_store(where, copies=self._copies))
            self._sources[output] = row_source(store, name)
        _check_same_rows(list(stores.values()))
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self._share = Share(batch_size, rank, world_size, worker, num_workers)
        self._rows, self.num_failed = usable_rows(list(stores.values()), subset)
        self.damaged: dict[int, str] = {}
        self.epoch, self.step = 0, 0
        self._iteration: weakref.ref[Generator[Batch]] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        return len(self._rows)

    def __len__(self) -> int:
        """Steps of an epoch, over all workers: the same on every rank."""
        if self.drop_last:
            return self.num_rows // self.batch_size
        return math.ceil(self.num_rows / self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch, and the batch size that it counts in (JSON)."""
        return {"epoch": self.epoch, "step": self.step, "batch_size": self.batch_size}

    def load_state_dict(self, state: Mapping[str, int]) -> Self:
        """Raises InputError where a step was not what it is here."""
        if "batch_size" not in state:
            raise InputError(
                "the place in the rows was saved when every process had an order of its own: it "
                "cannot be gone on from; train anew"
            )
        if state["batch_size"] != self.batch_size:
            raise InputError(
                f"the place in the rows was saved with batches of {state['batch_size']} rows over "
                f"all processes, not {self.batch_size}: restore that, or train anew"
            )
        self.epoch, self.step = state["epoch"], state["step"]
        return self

    def windows(self, epoch: int, step: int = 0) -> Iterator[Window]:
        """What this rank reads in an epoch from a step on, in order."""
        plan = plan_epoch(
            self._rows,
            block_rows=self.params.block_rows,
            buffer_rows=self.params.buffer_rows,
            seed=self.seed,
            epoch=epoch,
        )
        return plan.windows(self._share, step)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """This rank's rows of an epoch in the order they come: int64. Reads no data."""
        parts = [window.rows[window.permutation] for window in self.windows(epoch)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[Batch]:
        # One that was left half-way still reads ahead, from the same files.
        if self._iteration is not None and (unfinished := self._iteration()) is not None:
            unfinished.close()
        iteration = self._rest_of_epoch()
        self._iteration = weakref.ref(iteration)
        return iteration

    def _rest_of_epoch(self) -> Generator[Batch]:
        windows = self.windows(self.epoch, self.step)
        steps = self._share.steps(self.step, len(self))
        batches = in_background(lambda: self._batches(windows, steps), self.params.prefetch)
        try:
            for step, batch in zip(steps, batches):
                # Before it is handed out: with a batch in hand, the state is what follows.
                self.step = step + 1
                yield batch
        finally:
            batches.close()  # waits for its thread, which may be reading
            for source in self._sources.values():
                source.release()
        self.epoch, self.step = self.epoch + 1, 0

    def _batches(self, windows: Iterator[Window], steps: range) -> Iterator[Batch]:
        """The batches of these steps, of which the windows are."""
        with ThreadPoolExecutor(len(self._sources), "cache-read") as pool, fetchers() as fetching:
            if self._copies is not None:
                sources = self._sources.values()
                windows = fetched_ahead(windows, sources, self._copies.limit, fetching)
            prepared = self._prepared(windows, pool)
            left = np.zeros(0, np.int64)  # offsets in the current window that are still to come
            for step in steps:
                whole = min(self.batch_size, self.num_rows - step * self.batch_size)
                low, high = self._share.bounds(whole)
                size = high - low
                rows = np.empty(size, np.int64)
                arrays = {output: s.values.empty(size) for output, s in self._sources.items()}
                bad: dict[int, str] = {}
                filled = 0
                # A batch may end one window and begin the next.
                while filled < size:
                    if len(left) == 0:
                        window = next(prepared)
                        left = window.permutation
                    now, left = left[: size - filled], left[size - filled :]
                    here = slice(filled, filled + len(now))
                    rows[here] = window.rows[now]
                    for output, source in self._sources.items():
                        bad.update(self._judge(source, source.take(now, arrays[output][here])))
                    filled += len(now)
                if bad:
                    self.damaged.update(bad)
                    # In all arrays alike, whichever of them was damaged.
                    good = ~np.isin(rows, list(bad))
                    rows, arrays = rows[good], {name: a[good] for name, a in arrays.items()}
                yield Batch(rows, arrays)

    def _prepared(self, windows: Iterator[Window], pool: ThreadPoolExecutor) -> Iterator[Window]:
        """The windows, each made ready to take from while the one before it is in use."""
        sources = list(self._sources.values())

        def prepare_next() -> tuple[Window, list[Future[None]]] | None:
            if (window := next(windows, None)) is None:
                return None
            return window, [pool.submit(source.prepare, window) for source in sources]

        ahead = prepare_next()
        while ahead is not None:
            window, jobs = ahead
            for source, prepared in zip(sources, jobs):
                source.enter(window, prepared)
            ahead = prepare_next()
            yield window

    def _judge(self, source: RowSource, bad: dict[int, str]) -> dict[int, str]:
        if bad and self.params.on_damage == "stop":
            raise DamagedRowsError(damage_report(source.store, source.name, bad))
        return bad


def _check_same_rows(stores: Sequence[EmbeddingStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        if first.num_rows != other.num_rows:
            raise StoresDifferError(
                f"{first.location} has {first.num_rows:,} rows, {other.location} has "
                f"{other.num_rows:,}: fill both from one table"
            )
        if first.meta["rows_fingerprint"] != other.meta["rows_fingerprint"]:
            keys, others = first.read_table("row_key"), other.read_table("row_key")
            row = int(np.flatnonzero(keys != others)[0])
            raise StoresDifferError(
                f"{first.location} and {other.location} hold different rows, from row {row} on: "
                "fill both from one table"
            )


def usable_rows(
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


def in_background(make: Callable[[], Iterator[Item]], depth: int) -> Generator[Item]:
    """The items of an iterator that runs in a thread, at most `depth` ahead."""
    ready: queue.Queue[Item | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Item | BaseException | None) -> None:
        # Not a plain put: with the reader gone, it would wait for ever in a full queue.
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
        # Joined, so that whoever closes may close the files as well.
        stopped.set()
        thread.join()
