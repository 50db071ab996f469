"""A Dask cluster: finding its scheduler, watching over its workers, keeping them in work."""

from __future__ import annotations

import json
import os
import pickle
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import cloudpickle
import distributed

from cluster.jobs import Call, Lost, OnResult, logger, visible_gpus
from gill_errors import GillError, UnfitWorkerError

FILE_WAIT = 60.0  # seconds that a scheduler may take to write its scheduler file
WORKER_WAIT = 300.0  # seconds that the first worker may take to come
SILENCE = 30.0  # seconds without a result after which it is asked whether there is a worker at all


class SchedulerUnreachableError(GillError, RuntimeError):
    """There is no scheduler at the address, it went away, or it has no worker."""


class _NannyOfOneGpu(distributed.Nanny):
    """Bears worker processes that see one of this machine's GPUs: number i the i-th, in turn.

    In the environment before anything is imported there: libraries ask CUDA for its devices while
    they are imported, and what the variable says afterwards changes nothing.
    """

    def __init__(self, scheduler: Any, *, name: int, **options: Any) -> None:
        gpus = visible_gpus()
        env = {"CUDA_VISIBLE_DEVICES": gpus[name % len(gpus)]} if gpus else {}
        super().__init__(scheduler, name=name, env=env, **options)


@contextmanager
def connected(scheduler: str, num_workers: int | None) -> Iterator[distributed.Client]:
    """A client of workers on this machine that live as long, or of a running scheduler.

    threads: in this process. processes: one thread each, the GPUs dealt out among them in turn.
    local-cluster: as these, one per GPU where there are GPUs.

    TLS: as Dask's own configuration says (DASK_DISTRIBUTED__COMM__TLS__...).
    Raises SchedulerUnreachableError.
    """
    with ExitStack() as stack:
        address: Any = _address(scheduler)
        is_local = scheduler in ("threads", "processes", "local-cluster")
        if is_local:
            in_threads = scheduler == "threads"
            workers = num_workers or os.cpu_count() or 1
            if scheduler == "local-cluster":
                workers = num_workers or len(visible_gpus()) or workers
            address = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=1 if in_threads else workers,
                    threads_per_worker=workers if in_threads else 1,
                    processes=not in_threads,
                    worker_class=distributed.Worker if in_threads else _NannyOfOneGpu,
                    memory_limit=0,  # Dask would share it out evenly, and end what loads a model
                    dashboard_address=None,
                )
            )
        try:
            # Whatever else this process does with Dask goes on as if this client were not there.
            client = distributed.Client(address, set_as_default=False)
        except (OSError, ValueError, TypeError) as e:  # TypeError: TLS without certificates
            raise SchedulerUnreachableError(
                f"no Dask scheduler answers at {address}: {e}. Start one with `dask scheduler`, "
                "and see that this machine may connect to it"
            ) from e
        stack.enter_context(client)
        _await_worker(client)
        if not is_local:
            for warning in shared_gpus(client.run(_host_and_gpus, on_error="ignore")):
                logger.warning(warning)
        yield client


def run_calls(client: distributed.Client, calls: Iterable[Call], on_result: OnResult) -> None:
    """Run calls on the workers, two in hand per thread, and hand over what each returns.

    Raises what a call raises; hands over Lost for calls whose worker died again and again.
    """
    waiting = iter(calls)
    in_hand: dict[Any, distributed.Future] = {}
    ended: SimpleQueue[distributed.Future] = SimpleQueue()

    def submit() -> None:
        room = 2 * max(1, sum(client.nthreads().values())) - len(in_hand)
        for call in islice(waiting, max(0, room)):
            # Sealed, so that the scheduler need not import what the workers import: it takes long.
            sealed = cloudpickle.dumps(call)
            key = f"{_kind(call)}-{uuid.uuid4().hex}"
            # A key of its own and not pure: Dask would hand out an earlier result of an equal call.
            future = client.submit(do_sealed, sealed, key=key, pure=False)
            in_hand[future.key] = future
            future.add_done_callback(ended.put)

    try:
        _asking(client, submit)
        while in_hand:
            try:
                # With a limit, so that a cluster without workers does not look like a slow one.
                future = ended.get(timeout=SILENCE)
            except Empty:
                _explain_silence(client, len(in_hand))
                continue
            del in_hand[future.key]
            on_result(_result(client, future))
            _asking(client, submit)
    finally:
        if in_hand and client.status == "running":
            # After an error: nobody waits for these any more, and they would keep the workers busy.
            client.cancel(list(in_hand.values()), force=True)


def do_sealed(sealed: bytes) -> Any:
    """Do a call, on a worker."""
    try:
        call = pickle.loads(sealed)
    except ImportError as e:
        raise UnfitWorkerError(
            f"the worker on {socket.gethostname()} lacks what the run needs ({e}): start workers "
            "in the same environment, and again after the code has changed"
        ) from e
    return call()


def _kind(call: Any) -> str:
    """What the dashboard calls a task."""
    return type(call.args[-1]).__name__ if getattr(call, "args", None) else "task"


def _result(client: distributed.Client, future: distributed.Future) -> Any:
    # Nobody cancels while a result is awaited: a scheduler that was restarted has forgotten it.
    if future.status == "cancelled":
        raise SchedulerUnreachableError(_gone(client))
    if future.status == "error":
        error = future.exception()
        # Several workers died under it: handed over as a result, so that the others go on.
        if isinstance(error, distributed.KilledWorker):
            return Lost(str(error))
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, ImportError):
            raise UnfitWorkerError(
                f"the Dask scheduler lacks what the run needs ({error.__cause__}): start it in the "
                "same environment as the workers"
            ) from error
    return future.result()


def _asking(client: distributed.Client, question: Any) -> Any:
    """Put a question to the scheduler; a connection that breaks is told as what it means."""
    try:
        return question()
    except (OSError, TimeoutError) as e:
        raise SchedulerUnreachableError(_gone(client)) from e


def _gone(client: distributed.Client) -> str:
    return (
        f"the Dask scheduler at {client.scheduler_info().get('address', '?')} went away. "
        "What is done stays done: start it and its workers again, and run again"
    )


def _explain_silence(client: distributed.Client, unfinished: int) -> None:
    if client.status != "running":
        logger.warning("no connection to the Dask scheduler, trying again")
    elif not _asking(client, client.nthreads):
        logger.warning(f"no worker is left; {unfinished} or more tasks wait for one to come")


def _await_worker(client: distributed.Client) -> None:
    if not client.nthreads():
        logger.warning(f"waiting up to {WORKER_WAIT:.0f} s for the first worker")
    try:
        client.wait_for_workers(1, timeout=WORKER_WAIT)
    except TimeoutError as e:
        address = client.scheduler_info().get("address", "?")
        raise SchedulerUnreachableError(
            f"no worker came to the scheduler at {address} in {WORKER_WAIT:.0f} s: start some with "
            f"`dask worker {address}`"
        ) from e


def _address(scheduler: str) -> str:
    """The address that a scheduler file holds; anything else as it is."""
    if not scheduler.endswith(".json"):
        return scheduler
    deadline = time.monotonic() + FILE_WAIT
    while True:
        try:
            return json.loads(Path(scheduler).read_text())["address"]
        except (OSError, ValueError, KeyError) as e:  # not there, or not whole yet
            if time.monotonic() > deadline:
                raise SchedulerUnreachableError(
                    f"no scheduler wrote {scheduler} in {FILE_WAIT:.0f} s: start one with "
                    f"`dask scheduler --scheduler-file {scheduler}`"
                ) from e
        time.sleep(0.2)


def _host_and_gpus() -> tuple[str, tuple[str, ...]]:
    return socket.gethostname(), tuple(visible_gpus())


def shared_gpus(found: Mapping[str, tuple[str, tuple[str, ...]]]) -> list[str]:
    """What to tell people whose workers would all take the same GPU.

    found: address of a worker -> (its host, the GPUs that it sees). A worker takes the first one.
    """
    takers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for address, (host, gpus) in found.items():
        if gpus:
            takers[host, gpus[0]].append(address)
    return [
        f"{len(workers)} workers on {host} share GPU {gpu}: start each with a CUDA_VISIBLE_DEVICES "
        "of its own"
        for (host, gpu), workers in takers.items()
        if len(workers) > 1
    ]
