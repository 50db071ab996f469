"""Command run-variant: one variant of findings/variants.yaml trained and measured with one seed.

A finished cell is not run again, unless its params, its code or what it reads have changed; a
killed one goes on, as every stage does: what it had made lies in the work folder.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from evaluation.variants import (
    Cell,
    CellStage,
    Study,
    cell,
    cell_fingerprint,
    cell_params,
    is_finished,
)
from settings.params import Params
from workfolder import code_fingerprint, write_json


def run(params_file: Path, study: Study, name: str, seed: int, metrics: Path | None = None) -> Cell:
    """Run a cell; its numbers go to `metrics` as well, where that is named.

    Those whose heads it takes, or W_cap, run first, or are waited for.
    """
    one = cell(name, seed)
    params = cell_params(params_file, study, name, seed)
    variant = study.variant(name)
    fingerprint = cell_fingerprint(params_file, study, one)
    for other in variant.others.values():
        run(params_file, study, other, seed)
    one.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(one.folder.parent / f"{one.seed}.lock"):  # one that outlived its pool ends first
        if is_finished(one, fingerprint):
            print(f"{one}: finished before, in {one.folder}")
        else:
            seconds: dict[str, float] = {}
            for stage in variant.stages:
                start = time.monotonic()
                print(f"{one}: {stage}", flush=True)
                _run_stage(stage, params, one)
                seconds[stage] = round(time.monotonic() - start, 1)
            write_json(one.record, _record(one, params, fingerprint, seconds))
    if metrics is not None:
        write_json(metrics, cell_headline(one))
    return one


def cell_headline(one: Cell) -> dict[str, float]:
    """The numbers of a finished cell that `dvc exp show` has columns for."""
    from evaluation.headline import headline
    from evaluation.results import read_results

    return headline(read_results(one.artifacts.evaluation / "results.json"))


def _run_stage(stage: CellStage, params: Params, one: Cell) -> None:
    from stages import build_index, evaluate, fit_decision, precompute_latents, train

    artifacts, metrics = one.artifacts, one.folder / "metrics"
    if stage == "precompute-latents":
        precompute_latents.run(params, artifacts)
    elif stage == "train":
        train.run(params, artifacts, metrics)
    elif stage == "build-index":
        build_index.run(params, artifacts=artifacts)
    elif stage == "fit-decision":
        fit_decision.run(params, artifacts, metrics)
    else:
        evaluate.run(params, artifacts, metrics)


def _record(
    one: Cell, params: Params, fingerprint: str, seconds: dict[str, float]
) -> dict[str, Any]:
    from cluster.versions import library_versions

    return {
        "variant": one.name,
        "seed": one.seed,
        "fingerprint": fingerprint,
        "code": code_fingerprint("evaluation.tables"),
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": seconds,
        "params": params.model_dump(mode="json"),
        "versions": library_versions("torch", "transformers", "diffusers", "open_clip_torch"),
    }
