"""A Dask scheduler and workers as processes of their own, started by the ordinary commands.

Holds no test. What workers run lies here too, for they import it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
# As a library would see it that asks CUDA for its devices while it is imported.
GPUS_AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")


class DaskCluster:
    """`scheduler_file` and `address` lead to it; `workers[i].kill()` is what it looks like."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.scheduler_file = folder / "scheduler.json"
        self.scheduler = self._start(
            "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"
        )
        assert self.scheduler.stderr is not None
        self.address = next(
            line.split()[-1] for line in self.scheduler.stderr if "Scheduler at:" in line
        )
        self.workers: list[subprocess.Popen] = []

    def add_workers(self, count: int) -> None:
        """Workers that a kill ends for good, in a folder that is not the coordinator's."""
        arguments = ("distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny")
        self.workers += [self._start(*arguments) for _ in range(count)]

    def _start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", *arguments),
                *("--no-dashboard", "--scheduler-file", str(self.scheduler_file)),
            ],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}"},
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.communicate()


@contextmanager
def dask_cluster(folder: Path, workers: int) -> Iterator[DaskCluster]:
    """A cluster on this machine."""
    with DaskCluster(folder) as cluster:
        cluster.add_workers(workers)
        yield cluster


def make_lookup(log: str, seconds: float = 0.0) -> Callable[[int], tuple[int, str]]:
    """Work on a file that is named relative to the coordinator's folder; `log` counts makings."""
    with Path(log).open("a") as f:
        f.write(f"{os.getpid()}\n")

    def look_up(task: int) -> tuple[int, str]:
        time.sleep(seconds)
        return task, Path("words.txt").read_text().split()[task]

    return look_up


def make_deadly(seconds: float = 0.0) -> Callable[[int], int]:
    """Work of which task 3 kills its worker."""

    def work(task: int) -> int:
        if task == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        return task

    return work


def make_refusal() -> Callable[[Any], Any]:
    """Work that cannot be made."""
    raise ValueError("no such model")


def make_gpu_name() -> Callable[[Any], str | None]:
    """Tells which GPU this process would take."""

    def work(_: Any) -> str | None:
        time.sleep(0.2)
        return GPUS_AT_IMPORT

    return work
