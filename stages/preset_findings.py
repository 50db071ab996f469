"""GILL under another preset, with several seeds: a column of its own in the report.

Everything of it lies in artifacts/presets/NAME, a folder as `stages init` makes one; what is
expensive lies in the work folder of this one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import chdir
from importlib import import_module
from pathlib import Path

from evaluation import findings
from evaluation.variants import read_study
from gill.artifacts import ARTIFACTS
from settings.params import read_params
from stages import run_variants
from stages.init import preset_file
from workfolder import WorkFolder

_SHARED = (
    "prepare_captions", "prepare_backbones", "precompute_features", "precompute_targets",
    "precompute_latents", "precompute_replies",
)  # fmt: skip
"""Stages whose results all seeds read."""


def run(preset: str, *, jobs: int, seeds: Sequence[int] | None = None) -> None:
    """Run the cells of findings/NAME.yaml that are not finished, and put their numbers together.

    Raises StageError for a preset that there is not, or has no such file.
    """
    source = preset_file(preset)
    study_file = Path("findings", source.name).resolve()
    study = read_study(study_file)
    params = read_params(source)
    folder = ARTIFACTS.presets / source.stem
    folder.mkdir(parents=True, exist_ok=True)
    work, before = WorkFolder.open(params.run.work).root.resolve(), os.environ.get("GILL_WORK")
    with chdir(folder):
        own = Path("params.yaml")
        own.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        os.environ["GILL_WORK"] = str(work)
        try:
            for stage in _SHARED:
                import_module(f"stages.{stage}").run(params)
            run_variants.run(own, study_file, jobs=jobs, seeds=seeds)
            findings.run(own, study)
        finally:
            del os.environ["GILL_WORK"]
            if before is not None:
                os.environ["GILL_WORK"] = before
