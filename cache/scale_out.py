"""Shards as Dask tasks: on threads, on processes, on a local cluster, or on a running scheduler.

One task is one shard; no two tasks touch the same file, and only this process, the coordinator,
writes the row status. So a worker that dies costs its shard, which is done again by another one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, Self

from cache.encoding import Roles, ShardTask, encode_shards, sample_values
from cache.location import Location
from cache.store import EmbeddingStore, ShardResult, open_store

ATTEMPTS = 3  # times that a shard may lose its worker before it is given up
ROUND = 64  # tasks per worker that are handed to a local scheduler together


@dataclass(frozen=True)
class WorkOrder:
    """All that a worker needs to know of a run: small and picklable, whatever the roles hold."""

    location: Location
    run: str
    make_roles: Callable[[], Roles]
    batch_size: int
    num_readers: int


Call = Callable[[], Any]
Runner = Callable[[Iterable[Call], Callable[[Any], None]], None]


@dataclass(frozen=True)
class Lost:
    """A task whose workers died under it, ATTEMPTS times."""

    reason: str


def encode_one(order: WorkOrder, task: ShardTask) -> ShardResult:
    """Do one shard, in whatever process this runs."""
    return next(encode_in_turn(order, [task]))


def prepare(order: WorkOrder, rows: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What has to be known before the first shard: (values of the sample rows, the constants)."""
    _, roles = _tools(order)
    constants = dict(roles.constants()) if roles.constants else {}
    return sample_values(roles, rows, order.batch_size) if rows else {}, constants


def encode_in_turn(order: WorkOrder, tasks: Iterable[ShardTask]) -> Iterator[ShardResult]:
    """All shards in this process, reading ahead across their borders."""
    store, roles = _tools(order)
    return encode_shards(
        store, order.run, tasks, roles, batch_size=order.batch_size, num_readers=order.num_readers
    )


@contextmanager
def runner(scheduler: str, num_workers: int | None) -> Iterator[Runner]:
    """run(calls, on_result): run calls on a scheduler and hand over what each returns as it comes.

    Raises what a call raises; hands over Lost for calls whose worker died again and again.
    """
    if scheduler in ("threads", "processes"):
        with _LocalPool(scheduler, num_workers or os.cpu_count() or 1) as pool:
            yield pool.run
        return
    import distributed

    with ExitStack() as stack:
        address: Any = scheduler
        if scheduler == "local-cluster":
            address = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=num_workers, threads_per_worker=1, dashboard_address=None
                )
            )
        client = stack.enter_context(distributed.Client(address, set_as_default=False))
        yield partial(_run_on_cluster, client=client)


_tools_lock = threading.Lock()
_tools_made: dict[str, tuple[EmbeddingStore, Roles]] = {}


def _tools(order: WorkOrder) -> tuple[EmbeddingStore, Roles]:
    """The open store and the roles: made once per process and run, for models load slowly."""
    with _tools_lock:
        if order.run not in _tools_made:
            _tools_made.clear()  # the model of an earlier run need not stay in memory
            _tools_made[order.run] = (open_store(order.location), order.make_roles())
        return _tools_made[order.run]


def forget_tools() -> None:
    """Let go of the models that this process made for a run."""
    with _tools_lock:
        _tools_made.clear()


class _LocalPool:
    """Dask's own schedulers of one machine, on one pool of threads or processes for a whole run."""

    def __init__(self, scheduler: str, num_workers: int) -> None:
        self._scheduler, self._num_workers = scheduler, num_workers
        self._pool = self._start()

    def run(self, calls: Iterable[Call], on_result: Callable[[Any], None]) -> None:
        waiting = iter(calls)
        # In rounds, so that the tasks of millions of rows are never in memory together.
        while batch := dict(enumerate(islice(waiting, ROUND * self._num_workers))):
            self._run_round(batch, on_result)

    def _run_round(self, left: dict[int, Call], on_result: Callable[[Any], None]) -> None:
        import dask
        from dask.callbacks import Callback

        def posttask(_key: Any, result: Any, *_: Any) -> None:
            i, value = result
            del left[i]
            on_result(value)

        for _ in range(ATTEMPTS):
            tasks = [dask.delayed(partial(_numbered, i, call))() for i, call in left.items()]
            try:
                with Callback(posttask=posttask):
                    dask.compute(
                        *tasks,
                        scheduler=self._scheduler,
                        pool=self._pool,
                        chunksize=1,
                        optimize_graph=False,
                    )
                return
            except BrokenProcessPool as e:
                self._pool, reason = self._start(), str(e)
        on_result(Lost(f"worker processes died {ATTEMPTS} times, lastly: {reason}"))

    def _start(self) -> Executor:
        if self._scheduler == "threads":
            return ThreadPoolExecutor(self._num_workers)
        return ProcessPoolExecutor(self._num_workers, mp_context=get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _numbered(i: int, call: Call) -> tuple[int, Any]:
    return i, call()


def _run_on_cluster(
    calls: Iterable[Call], on_result: Callable[[Any], None], *, client: Any
) -> None:
    """A distributed scheduler, with two tasks in hand per thread of its workers."""
    import distributed

    waiting = iter(calls)
    in_hand: set[str] = set()
    client.wait_for_workers(1, timeout=60)

    def submit() -> list[Any]:
        room = 2 * max(1, sum(client.nthreads().values())) - len(in_hand)
        futures = [client.submit(call, pure=False) for _, call in zip(range(room), waiting)]
        in_hand.update(future.key for future in futures)
        return futures

    pool = distributed.as_completed(submit(), loop=client.loop)
    for future in pool:
        in_hand.discard(future.key)
        if future.status == "error" and isinstance(future.exception(), distributed.KilledWorker):
            on_result(Lost(str(future.exception())))
        else:
            on_result(future.result())
        pool.update(submit())
