"""Stage run-variants: all cells of findings/variants.yaml, several at a time.

Every cell is a process of its own with one thread: two of them are faster than one with two. They
are forked from one that has imported the libraries, which takes as long as a tenth of a cell. What
a cell prints is in its log.txt. A cell that fails does not stop the others; the run then ends with
an error that names it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from evaluation.variants import BASELINE, Cell, cell, is_done, read_study
from gill.artifacts import ARTIFACTS
from gill_errors import GillError, StageError
from gill_progress import Ticker, duration
from settings.params import read_params
from stages import run_variant
from stages.build_index import have_candidates
from workfolder import WorkFolder

# What a cell imports first or last: all that is slow to import is behind one of these.
_IMPORTED_ONCE = ["evaluation.tables", "stages.decision_labels", "stages.head_training"]


@dataclass
class _Running:
    cell: Cell
    process: BaseProcess
    began: float


def run(
    params_file: Path,
    study_file: Path,
    *,
    jobs: int,
    seeds: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[Cell]:
    """Run the cells that are not finished, `jobs` at a time; gives all of them.

    `seeds`, `names`: only these; None: all that the study has.

    Raises StageError naming the cells that failed and their logs.
    """
    study = read_study(study_file)
    cells = [cell(name, seed) for seed in seeds or study.seeds for name in names or study.variants]
    waiting = [one for one in cells if not is_done(params_file, study, one)]
    # The longest first, so that no core waits for it at the end.
    waiting.sort(key=lambda one: one.name != BASELINE)
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} finished before; {jobs} at a time")
    if waiting:  # each builds an index of its own, of these
        params = read_params(params_file)
        have_candidates(WorkFolder.open(params.run.work), params, ARTIFACTS)
    failed = _run_all((params_file, study_file), waiting, jobs)
    if failed:
        logs = ", ".join(f"{one} ({one.log})" for one in failed)
        raise StageError(f"{len(failed)} of {len(waiting)} cells failed: {logs}")
    return cells


def _run_all(files: tuple[Path, Path], cells: Sequence[Cell], jobs: int) -> list[Cell]:
    waiting, running = list(reversed(cells)), list[_Running]()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED_ONCE)
    before = signal.signal(signal.SIGTERM, _interrupt)
    failed: list[Cell] = []
    began, done = time.monotonic(), 0
    try:
        with Ticker("variants") as ticker:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(files, waiting.pop()))
                time.sleep(0.2)
                for one in [r for r in running if r.process.exitcode is not None]:
                    running.remove(one)
                    done += 1
                    good = one.process.exitcode == 0
                    if not good:
                        failed.append(one.cell)
                    spent = time.monotonic() - one.began
                    state = f"finished in {spent:.0f} s" if good else f"FAILED, see {one.cell.log}"
                    print(f"[{done}/{len(cells)}] {one.cell}: {state}", flush=True)
                ticker.show(_state(running, done, len(cells), time.monotonic() - began))
    finally:
        _stop(running)
        signal.signal(signal.SIGTERM, before)
    return failed


def _start(files: tuple[Path, Path], one: Cell) -> _Running:
    one.folder.mkdir(parents=True, exist_ok=True)
    one.log.write_bytes(b"")  # here by the time that its last line is shown
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run_cell, args=(files, one))
    process.start()
    return _Running(one, process, time.monotonic())


def _run_cell(files: tuple[Path, Path], one: Cell) -> None:
    """Run a cell in the process that is forked for it."""
    with one.log.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    params_file, study_file = files
    try:
        run_variant.run(params_file, read_study(study_file), one.name, one.seed)
    except GillError as failure:
        sys.exit(f"error: {failure}")


def _interrupt(*_: object) -> None:
    """Being terminated is like Ctrl-C: the cells are stopped too."""
    raise KeyboardInterrupt


def _stop(running: Iterable[_Running]) -> None:
    """Ends what still runs when this process is stopped; the cells go on from there next time."""
    for one in running:
        one.process.terminate()
    for one in running:
        one.process.join()


def _state(running: Sequence[_Running], done: int, total: int, spent: float) -> str:
    now = ", ".join(f"{one.cell.name}/{one.cell.seed}: {_last_line(one.cell)}" for one in running)
    left = f", about {duration(spent / done * (total - done))} left" if done else ""
    return f"{done} of {total} cells in {duration(spent)}{left}; {now}"


def _last_line(one: Cell) -> str:
    """The newest line of a cell's log, shortened."""
    with one.log.open("rb") as stream:
        stream.seek(max(0, one.log.stat().st_size - 400))
        lines = stream.read().decode("utf-8", "replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "starting")[:48]
