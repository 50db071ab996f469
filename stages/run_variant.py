"""Stage run-variant: one variant of findings/variants.yaml trained and measured with one seed.

A finished cell is not run again, unless its params or what it reads have changed; a killed one goes
on: training from its last state, evaluation from its last example.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.params import Params
from stages.variants import (
    Cell,
    CellStage,
    Study,
    cell,
    cell_fingerprint,
    cell_params,
    code_fingerprint,
)


def run(params_file: Path, study: Study, name: str, seed: int, metrics: Path | None = None) -> Cell:
    """Run a cell; its numbers go to `metrics` as well, where that is named."""
    one = cell(name, seed)
    params = cell_params(params_file, study, name, seed)
    variant = study.variant(name)
    fingerprint = cell_fingerprint(params, variant, one.artifacts)
    with _alone(one):
        if is_finished(one, fingerprint):
            print(f"{one}: finished before, in {one.folder}")
        else:
            _put_aside(one, fingerprint)
            seconds: dict[str, float] = {}
            for stage in variant.stages:
                start = time.monotonic()
                print(f"{one}: {stage}", flush=True)
                _run_stage(stage, params, one)
                seconds[stage] = round(time.monotonic() - start, 1)
            _write_json(one.record, _record(one, params, fingerprint, seconds))
    if metrics is not None:
        _write_json(metrics, headline(one))
    return one


@contextmanager
def _alone(one: Cell) -> Iterator[None]:
    """Waits while another process runs this cell: one that outlived the pool that began it."""
    one.folder.mkdir(parents=True, exist_ok=True)
    with (one.folder.parent / f"{one.seed}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{one}: waiting for another process that runs it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_finished(one: Cell, fingerprint: str) -> bool:
    """Whether a cell is there with exactly these params and inputs."""
    if not one.record.is_file():
        return False
    return json.loads(one.record.read_text(encoding="utf-8")).get("fingerprint") == fingerprint


def headline(one: Cell) -> dict[str, float]:
    """What `dvc exp show` has columns for: what was generated, by both judges."""
    from stages.results import read_results

    return {
        f"{result.set}.{result.metric}": round(result.value, 4)
        for result in read_results(one.artifacts.evaluation / "results.json")
        if result.value is not None
        and result.method == "gill"
        and result.metric in ("oracle_attributes", "clip_similarity")
    }


def _put_aside(one: Cell, fingerprint: str) -> None:
    """A folder begun with other params or inputs is emptied; one begun with these is gone on with.

    The log stays: the process that runs this cell writes it.
    """
    begun = one.folder / "begun.json"
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) == fingerprint:
        return
    for path in one.folder.iterdir() if one.folder.is_dir() else ():
        if path != one.log:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write_json(begun, fingerprint)


def _run_stage(stage: CellStage, params: Params, one: Cell) -> None:
    from stages import build_index, evaluate, fit_decision, train

    artifacts, metrics = one.artifacts, one.folder / "metrics"
    if stage == "train":
        if not (one.folder / "trained").is_file():  # a finished training is not begun again
            train.run(params, artifacts, metrics)
            (one.folder / "trained").touch()
    elif stage == "build-index":
        build_index.run(params, rebuild=False, artifacts=artifacts)
    elif stage == "fit-decision":
        fit_decision.run(params, artifacts, metrics)
    else:
        evaluate.run(params, artifacts, metrics)


def _record(
    one: Cell, params: Params, fingerprint: str, seconds: dict[str, float]
) -> dict[str, Any]:
    from stages.versions import library_versions

    return {
        "variant": one.name,
        "seed": one.seed,
        "fingerprint": fingerprint,
        "code": code_fingerprint(),
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": seconds,
        "params": params.model_dump(mode="json"),
        "versions": library_versions("torch", "transformers", "diffusers", "open_clip_torch"),
    }


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
