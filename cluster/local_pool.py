"""Dask's own schedulers of one machine: threads, or processes."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, Self

from cluster.jobs import Call, Lost, OnResult

ATTEMPTS = 3  # times that a pool may lose its workers before its tasks are given up
ROUND = 64  # tasks per worker that are handed over together


class LocalPool:
    """Dask's own schedulers of one machine, on one pool of threads or processes for a whole run."""

    def __init__(self, scheduler: str, num_workers: int) -> None:
        self._scheduler, self._num_workers = scheduler, num_workers
        self._pool = self._start()

    def run(self, calls: Iterable[Call], on_result: OnResult) -> None:
        waiting = iter(calls)
        # In rounds, so that the tasks of millions of rows are never in memory together.
        while batch := dict(enumerate(islice(waiting, ROUND * self._num_workers))):
            self._run_round(batch, on_result)

    def _run_round(self, left: dict[int, Call], on_result: OnResult) -> None:
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
        on_result(Lost(len(left), f"worker processes died {ATTEMPTS} times, lastly: {reason}"))

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
