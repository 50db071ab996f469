"""Tasks on threads, on processes, on a local Dask cluster, or on a running Dask scheduler.

    make() -> work          once in every process that works: here models are loaded
    work(task) -> result    task after task; a task and its result are small and picklable
    on_result(result)       in this process, the coordinator, as they come

Nothing here knows a store or a model: `fill` hands out the shards of a store, stages hand out
whatever else is cut into pieces. A worker that dies costs its task, which another one does again,
so a task must be safe to repeat: write files whole or not at all, and to one place per task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field

from cluster.jobs import Call, Job, Lost, OnResult, Work, do_task, forget
from gill_errors import InputError, TasksLostError
from gill_records import Record

WAVE = 64  # results that wait to be put in order


def _known(value: str) -> str:
    local = ("single", "threads", "processes", "local-cluster")
    if value not in local and "://" not in value and not value.endswith(".json"):
        raise InputError(
            f"{value!r} is no scheduler: {', '.join(local)}, an address, a scheduler file"
        )
    return value


SchedulerName = Annotated[str, AfterValidator(_known)]


class ScaleOutParams(Record):
    """Where tasks run. What comes out does not depend on it, on machines of one kind."""

    scheduler: SchedulerName = Field(
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


def crew_for(
    params: ScaleOutParams, versions: Mapping[str, str]
) -> Callable[[Callable[[], Work]], Crew] | None:
    """What opens a Crew for a work that is made later; None where there is this process alone."""
    if params.scheduler == "single":
        return None
    return lambda make: Crew(make, params, versions=versions)


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
        # In this process one at a time: each result is handed on before the next is made.
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
        self._job = Job(make, dict(versions or {}))
        self._params = params
        self._held = ExitStack()
        self._run_calls: Callable[[Iterable[Call], OnResult], None] | None = None
        self._own_work: Work | None = None

    def __enter__(self) -> Self:
        self._held.callback(forget, self._job)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def __call__(self, tasks: Iterable[Any], on_result: OnResult) -> None:
        """Do the tasks where the params say; `on_result` gets each result, in this process."""
        if self._params.scheduler == "single":
            for task in tasks:
                # With the first task: where there is none, no model is loaded.
                self._own_work = self._own_work or self._job.make()
                on_result(self._own_work(task))
            return
        self._run_calls = self._run_calls or self._start()
        lost: list[Lost] = []

        # The other tasks are done before the lost ones are told of: their results count.
        def take(result: Any) -> None:
            if isinstance(result, Lost):
                lost.append(result)
            else:
                on_result(result)

        self._run_calls((partial(do_task, self._job, task) for task in tasks), take)
        if lost:
            raise TasksLostError(
                f"{len(lost)} tasks are not done, as their workers died under them: "
                f"{lost[0].reason}"
            )

    def _start(self) -> Callable[[Iterable[Call], OnResult], None]:
        from cluster import dask_scheduler

        found = dask_scheduler.connected(self._params.scheduler, self._params.num_workers)
        return partial(dask_scheduler.run_calls, self._held.enter_context(found))
