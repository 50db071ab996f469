"""Tasks on threads, on processes, on a local Dask cluster, or on a running Dask scheduler.

    make() -> work          once in every process that works: here models are loaded
    work(task) -> result    task after task; a task and its result are small and picklable
    on_result(result)       in this process, the coordinator, as they come

Nothing here knows a store or a model: `fill` hands out the shards of a store, stages hand out
whatever else is cut into pieces. A worker that dies costs its task, which another one does again,
so a task must be safe to repeat: write files whole or not at all, and to one place per task.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gill_errors import InputError, TasksLostError, UnfitWorkerError

ATTEMPTS = 3  # times that a task may lose its worker before it is given up
ROUND = 64  # tasks per worker that are handed to a local scheduler together
WAVE = 64  # results that wait to be put in order

Work = Callable[[Any], Any]
Call = Callable[[], Any]
OnResult = Callable[[Any], None]

logger = logging.getLogger("cache")


class ScaleOutParams(BaseModel):
    """Where tasks run. What comes out does not depend on it, on machines of one kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduler: str = Field(
        default="single",
        description="single: in this process. Otherwise by Dask: threads, processes, local-cluster "
        "(a worker per GPU where there are GPUs), or a running scheduler by its address such as "
        "tcp://10.0.0.1:8786 or its scheduler file (*.json).",
    )
    num_workers: int | None = Field(
        default=None,
        ge=1,
        description="Workers of threads, processes and local-cluster; null: one per core.",
    )

    @field_validator("scheduler")
    @classmethod
    def _known(cls, value: str) -> str:
        local = ("single", "threads", "processes", "local-cluster")
        if value not in local and "://" not in value and not value.endswith(".json"):
            raise InputError(
                f"{value!r} is no scheduler: {', '.join(local)}, an address, a scheduler file"
            )
        return value


@dataclass(frozen=True)
class Lost:
    """Tasks whose workers died under them, ATTEMPTS times."""

    count: int
    reason: str


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know of a run: small and picklable, whatever `make` makes."""

    make: Callable[[], Work]
    versions: Mapping[str, str] = field(default_factory=dict)
    is_local_cluster: bool = False
    folder: str = field(default_factory=os.getcwd)
    run: str = field(default_factory=lambda: uuid.uuid4().hex)


def crew_for(
    params: ScaleOutParams, versions: Mapping[str, str]
) -> Callable[[Callable[[], Work]], Crew] | None:
    """What opens a Crew for a work that is made later; None where there is this process alone."""
    return None if params.scheduler == "single" else partial(_crew, params, versions)


def _crew(params: ScaleOutParams, versions: Mapping[str, str], make: Callable[[], Work]) -> Crew:
    return Crew(make, params, versions=versions)


def map_tasks(
    make: Callable[[], Work],
    tasks: Iterable[Any],
    on_result: OnResult,
    params: ScaleOutParams | None = None,
    *,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Do every task, and hand over each result as it comes, in any order.

    make: for processes and clusters a module-level function, or a partial of one.
    versions: {distribution: version} that a worker must have too (after a `+` they may differ).

    Raises TasksLostError once all others are done, UnfitWorkerError, SchedulerUnreachableError, and
    what `work` raises.
    """
    with Crew(make, params or ScaleOutParams(), versions=versions) as run:
        run(tasks, on_result)


def map_in_order(
    make: Callable[[], Work],
    tasks: Iterable[Any],
    params: ScaleOutParams | None = None,
    *,
    versions: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """The results in the order of the tasks, WAVE of them in memory. Raises as `map_tasks`."""
    waiting = enumerate(tasks)
    params = params or ScaleOutParams()
    with Crew(partial(_numbering, make), params, versions=versions) as run:
        while wave := list(islice(waiting, 1 if params.scheduler == "single" else WAVE)):
            results: dict[int, Any] = {}
            run(wave, lambda pair, into=results: into.__setitem__(*pair))  # type: ignore[misc]
            yield from (results[number] for number, _ in wave)


def _numbering(make: Callable[[], Work]) -> Work:
    work = make()
    return lambda numbered: (numbered[0], work(numbered[1]))


class Crew:
    """Workers for one kind of work: call it with tasks, as often as there are some.

    Called as `map_tasks`, which it is in pieces. It takes on workers, and they make the work, when
    it is first called; leaving the `with` block lets them go.
    """

    def __init__(
        self,
        make: Callable[[], Work],
        params: ScaleOutParams,
        *,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self._job = Job(make, dict(versions or {}), params.scheduler == "local-cluster")
        self._params = params
        self._held = ExitStack()
        self._run_calls: Callable[[Iterable[Call], OnResult], None] | None = None
        self._own_work: Work | None = None

    def __enter__(self) -> Self:
        self._held.callback(_forget, self._job)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def __call__(self, tasks: Iterable[Any], on_result: OnResult) -> None:
        if self._params.scheduler == "single":
            for task in tasks:
                self._own_work = self._own_work or self._job.make()
                on_result(self._own_work(task))
            return
        self._run_calls = self._run_calls or self._start()
        lost: list[Lost] = []

        def take(result: Any) -> None:
            if isinstance(result, Lost):
                lost.append(result)
            else:
                on_result(result)

        self._run_calls((partial(do_task, self._job, task) for task in tasks), take)
        if lost:
            raise TasksLostError(
                f"{sum(one.count for one in lost)} tasks are not done, as their workers died under "
                f"them: {lost[0].reason}"
            )

    def _start(self) -> Callable[[Iterable[Call], OnResult], None]:
        scheduler, num_workers = self._params.scheduler, self._params.num_workers
        if scheduler in ("threads", "processes"):
            pool = _LocalPool(scheduler, num_workers or os.cpu_count() or 1)
            return self._held.enter_context(pool).run
        from cluster import dask_scheduler

        client = self._held.enter_context(dask_scheduler.connected(scheduler, num_workers))
        return partial(dask_scheduler.run_calls, client)


# What one process keeps: the work of one run, and how many tasks it is doing.
_turn = threading.Condition()
_made: dict[str, Work] = {}
_busy = 0


def do_task(job: Job, task: Any) -> Any:
    """Do one task, in whatever process this runs; the first of a run makes the work."""
    global _busy
    with _turn:
        # Another run's tasks may rely on the working directory, and its model takes the memory.
        while _busy and job.run not in _made:
            _turn.wait()
        if job.run not in _made:
            _made.clear()
            _settle_in(job)
            _made[job.run] = job.make()
        work = _made[job.run]
        _busy += 1
    try:
        return work(task)
    finally:
        with _turn:
            _busy -= 1
            _turn.notify_all()


def _forget(job: Job) -> None:
    """Let go of the models that this process made for a run."""
    with _turn:
        _made.pop(job.run, None)


def _settle_in(job: Job) -> None:
    """Make this process see what the coordinator sees, or say why it cannot."""
    here = f"the worker on {socket.gethostname()} (process {os.getpid()})"
    try:
        if os.getcwd() != job.folder:
            os.chdir(job.folder)  # tables and manifests name files relative to it
    except OSError as e:
        raise UnfitWorkerError(
            f"{here} cannot enter {job.folder}, where the run was started: {e.strerror}. All "
            "machines of a cluster need the same files under the same path"
        ) from e
    for name, wanted in job.versions.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found.partition("+")[0] != wanted.partition("+")[0]:
            raise UnfitWorkerError(
                f"{here} has {name} {found}, the run was started with {wanted}: "
                "install the same versions on all machines"
            )
    if job.is_local_cluster and len(gpus := visible_gpus()) > 1:
        from distributed import get_worker

        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(get_worker().name) % len(gpus)]


def visible_gpus() -> Sequence[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one.strip() for one in named.split(",") if one.strip()]
    found = [p.name for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    return [str(number) for number in range(len(found))]


class _LocalPool:
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
