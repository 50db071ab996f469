"""SIGKILLs at random moments over all stages of a very small miniature, then what they cost.

    python -m tests.kills --kills 500 --json benchmarks/results/torture.json

Rounds of whole runs, each in a folder of its own. Every stage is killed at random moments between
its start and its undisturbed end, gone on with, and at last left alone; then the round's end state
is compared with an undisturbed run: rows lost, rows doubled, bytes equal. Most kills strike a stage
forked from this process, which has imported the libraries, so that a kill costs a second; others
strike workers of `processes`, workers of a Dask cluster, and whole `dvc repro` commands. A stage
that ended before its kill does not count. Holds no test; `make torture`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from evaluation.variants import lay_over
from stages import init
from tests.dask_cluster import DaskCluster
from tests.end_states import bytes_of, rows_of

ROOT = Path(__file__).parents[1]
PARAMS: dict[str, Any] = {
    "run": {
        "log_every": 1,
        "checkpoint_every": 1,
        "batch_sizes": {"features": 8, "targets": 8, "pictures": 4},
    },
    "captions": {
        "miniature": {
            "pictures": 60, "held_out_pictures": 20, "stories": 4, "dialogues": 4, "prompts": 80,
        }
    },
    "features": {"shard_rows": 8},
    "targets": {"shard_rows": 8},
    "training": {"steps": 12, "batch_size": 8, "validate_every": 4},
    "decision": {"folds": 2, "regularisation": [0.01, 1.0]},
    "generation": {"steps": 4, "guidance": 2.5},
    "evaluation": {
        "tables": ["captions", "retrieval", "table_1", "table_6"], "captions": 4,
        "vist": {"limit": 2}, "retrieval_scenes": 20, "examples_shown": 2,
    },
}  # fmt: skip
STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
WITH_WORKERS = ("precompute-features", "precompute-targets", "build-index")


def begin(folder: Path, **run: Any) -> Path:
    """A folder in which `dvc repro` and every stage run."""
    folder.mkdir(parents=True)
    init.run("miniature", None, folder)
    file = folder / "params.yaml"
    params = lay_over(lay_over(yaml.safe_load(file.read_text()), PARAMS), {"run": run})
    file.write_text(yaml.safe_dump(params, sort_keys=False))
    return folder


class StageProcess:
    """A stage in a process of its own, forked from this one."""

    def __init__(self, folder: Path, stage: str) -> None:
        self._id = os.fork()
        if self._id:
            return
        try:
            os.setsid()
            os.chdir(folder)
            log = os.open(f"{stage}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from stages.cli import app

            sys.argv = ["stages", stage]
            app()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            Path(f"{stage}.modules").write_text("\n".join(sys.modules))
            os._exit(code)

    def workers(self) -> list[psutil.Process]:
        """The processes below it that do its tasks."""
        try:
            below = psutil.Process(self._id).children(recursive=True)
            return [child for child in below if "spawn_main" in " ".join(child.cmdline())]
        except psutil.NoSuchProcess:
            return []

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self._id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """End it and its workers, as a lost machine would."""
        try:
            os.killpg(self._id, signal.SIGKILL)
        except ProcessLookupError:  # before setsid
            os.kill(self._id, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code; below 0: killed."""
        return os.waitstatus_to_exitcode(os.waitpid(self._id, 0)[1])


class Torture:
    """Rounds of kills, and what they cost."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.too_late = self.rounds = 0
        self.seconds: dict[str, float] = {}
        self.compared: Counter[str] = Counter()
        self.differing: list[str] = []
        reference = begin(folder / "undisturbed")
        for stage in STAGES:
            self._finish(reference, stage)
            # What it imported, the next processes are born with.
            for module in (reference / f"{stage}.modules").read_text().split():
                with suppress(Exception):
                    importlib.import_module(module)
        self.rows, self.bytes = rows_of(reference), bytes_of(reference)
        again = begin(self._next())
        for stage in STAGES:
            began = time.monotonic()
            self._finish(again, stage)
            self.seconds[stage] = time.monotonic() - began
        self._compare(again)  # two undisturbed runs are alike

    def round_of_stages(self) -> None:
        folder = begin(self._next())
        for stage in STAGES:
            # The long ones less often: a minute for each stage and round.
            for _ in range(round(min(25, max(4, 60 / self.seconds[stage])))):
                process = StageProcess(folder, stage)
                time.sleep(self.random.uniform(0, self.seconds[stage]))
                process.kill()
                if process.wait() >= 0:
                    self.too_late += 1
                    break
                self._count(stage, "stage")
            self._finish(folder, stage)
        self._compare(folder)

    def round_of_workers(self, kills_a_stage: int, scheduler: str = "processes") -> None:
        """Kill workers of a stage, which goes on with the others, or ends and is run again."""
        folder = begin(self._next(), scheduler=scheduler, workers=2)
        for stage in STAGES:
            for _ in range(kills_a_stage if stage in WITH_WORKERS else 0):
                process = StageProcess(folder, stage)
                if self._kill_one(process.ended, process.workers):
                    self._count(stage, "worker of processes")
                process.wait()
            self._finish(folder, stage)
        self._compare(folder)

    def round_of_dask(self, kills_a_stage: int) -> None:
        """The same with the workers of a running cluster; a new worker comes for each."""
        beside = self._next()
        beside.mkdir()
        with DaskCluster(beside) as cluster:
            cluster.add_workers(2)
            folder = begin(self._next(), scheduler=str(cluster.scheduler_file))
            for stage in STAGES:
                for _ in range(kills_a_stage if stage in WITH_WORKERS else 0):
                    process = StageProcess(folder, stage)
                    alive = [psutil.Process(w.pid) for w in cluster.workers if w.poll() is None]
                    if self._kill_one(process.ended, lambda alive=alive: alive):
                        self._count(stage, "dask worker")
                        cluster.add_workers(1)
                    process.wait()
                self._finish(folder, stage)
        self._compare(folder)

    def round_of_dvc(self, kills: int) -> None:
        """Kill whole `dvc repro` commands, with whichever stage runs."""
        folder = begin(self._next())
        (folder / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
        for _ in range(kills):
            process = self._dvc(folder)
            began, until = time.monotonic(), self.random.uniform(3, 60)
            while process.poll() is None and time.monotonic() - began < until:
                time.sleep(0.05)
            stage = _stage_below(process.pid)
            if process.poll() is not None:
                self.too_late += 1
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for lock in (folder / ".dvc/tmp").glob("*lock*"):
                lock.unlink()
            self._count(stage, "dvc repro")
        assert self._dvc(folder).wait() == 0, (folder / "dvc.log").read_text()[-3000:]
        self._compare(folder)

    def _next(self) -> Path:
        self.rounds += 1
        return self.folder / f"{self.rounds}"

    def _count(self, stage: str, kind: str) -> None:
        self.kills[stage] += 1
        self.kinds[kind] += 1

    def _finish(self, folder: Path, stage: str) -> None:
        code = StageProcess(folder, stage).wait()
        assert code == 0, f"{folder}: {stage}: {(folder / f'{stage}.log').read_text()[-3000:]}"

    def _kill_one(
        self, ended: Callable[[], bool], workers: Callable[[], list[psutil.Process]]
    ) -> bool:
        """Kill a worker at a random moment, if the stage does not end before."""
        while not workers():  # they take seconds to come
            if ended():
                return False
            time.sleep(0.02)
        moment = time.monotonic() + self.random.uniform(0, 6)
        while time.monotonic() < moment or not workers():
            if ended():
                self.too_late += 1
                return False
            time.sleep(0.02)
        victim = self.random.choice(workers())
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def _dvc(self, folder: Path) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with (folder / "dvc.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dvc", "repro"],
                cwd=folder,
                env=os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _compare(self, folder: Path) -> None:
        """Rows lost and doubled, and files that differ, in all tables and stores of the round."""
        rows, contents = rows_of(folder), bytes_of(folder)
        for name, expected in self.rows.items():
            lost, doubled = expected - rows[name], rows[name] - expected
            self.compared["rows"] += expected.total()
            self.compared["lost"] += lost.total()
            self.compared["doubled"] += doubled.total()
        self.compared["files"] += len(self.bytes)
        for name in sorted(self.bytes.keys() | contents.keys()):
            if self.bytes.get(name) != contents.get(name):
                self.differing.append(f"{folder.name}: {name}")
        print(
            f"round {self.rounds}: {self.kills.total()} kills, {dict(self.compared)}, "
            f"differing {self.differing[-5:]}",
            flush=True,
        )
        if not self.differing:
            shutil.rmtree(folder)

    def result(self) -> dict[str, Any]:
        git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        return {
            "commit": done.stdout.strip(),
            "date": datetime.date.today().isoformat(),
            "kills": self.kills.total(),
            "kills_by_stage": {stage: self.kills[stage] for stage in [*STAGES, "between stages"]},
            "kills_by_kind": dict(self.kinds),
            "came_after_the_end_and_do_not_count": self.too_late,
            "runs_compared": self.rounds,
            "rows_compared": self.compared["rows"],
            "rows_lost": self.compared["lost"],
            "rows_doubled": self.compared["doubled"],
            "files_compared": self.compared["files"],
            "bytes_equal": not self.differing,
            "files_that_differ": [*self.differing[:20], f"{len(self.differing)} in all"],
        }


def _stage_below(process: int) -> str:
    """Which stage runs below `dvc repro`."""
    try:
        below = psutil.Process(process).children(recursive=True)
        words = [word for child in below for word in child.cmdline()]
    except psutil.NoSuchProcess:
        return "between stages"
    return next((stage for stage in STAGES if stage in words), "between stages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    os.environ.pop("GILL_WORK", None)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    torture = Torture(folder, options.seed)
    print({stage: round(seconds, 1) for stage, seconds in torture.seconds.items()}, flush=True)
    rounds = [
        torture.round_of_stages,
        lambda: torture.round_of_workers(3),
        torture.round_of_stages,
        lambda: torture.round_of_dask(3),
        torture.round_of_stages,
        lambda: torture.round_of_dvc(8),
    ]
    while rounds or torture.kills.total() < options.kills:
        (rounds.pop(0) if rounds else torture.round_of_stages)()
        if options.json:
            options.json.write_text(json.dumps(torture.result(), indent=1) + "\n")
    result = torture.result()
    print(json.dumps(result, indent=1))
    if result["rows_lost"] or result["rows_doubled"] or not result["bytes_equal"]:
        sys.exit(f"what differs lies in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
