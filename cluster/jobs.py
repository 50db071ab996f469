"""What a worker does: make the work once, then task after task; and how it is checked first."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gill_errors import UnfitWorkerError

Work = Callable[[Any], Any]
Call = Callable[[], Any]
OnResult = Callable[[Any], None]

logger = logging.getLogger("cluster")


@dataclass(frozen=True)
class Lost:
    """What became of a task whose workers died under it, again and again."""

    reason: str


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know of a run: small and picklable, whatever `make` makes."""

    make: Callable[[], Work]
    versions: Mapping[str, str] = field(default_factory=dict)
    folder: str = field(default_factory=os.getcwd)
    run: str = field(default_factory=lambda: uuid.uuid4().hex)


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
            # With the lock, so that threads of one process make one model and share it. The earlier
            # run's goes first: two need not fit into the memory.
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


def forget(job: Job) -> None:
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


def visible_gpus() -> Sequence[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one.strip() for one in named.split(",") if one.strip()]
    found = [p.name for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    return [str(number) for number in range(len(found))]
