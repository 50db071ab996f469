"""Stage evaluate: the tables of the paper, on the miniature world or on the original files."""

from __future__ import annotations

from pathlib import Path

from gill.artifacts import ARTIFACTS, INPUTS, METRICS, Artifacts
from gill.dimensions import check_dimensions
from settings.params import Params
from settings.replies import OWN_QUESTIONS
from stages.models_in_use import models_in_use
from workfolder import (
    WorkFolder,
    bring_from_repository,
    code_of,
    content_of,
    signature,
    watch_files,
)


def run(params: Params, artifacts: Artifacts = ARTIFACTS, metrics: Path = METRICS) -> None:
    """Make artifacts/evaluation, unless exactly this evaluation is in the work folder.

    Pictures and texts that were made before, for whichever evaluation, are taken from there.
    """
    check_dimensions(artifacts, (), params)
    work = WorkFolder.open(params.run.work)
    files, replies = params.evaluation.files(), params.training.replies
    asks = "chat" in params.evaluation_tables and replies.questions != OWN_QUESTIONS
    if asks:
        files |= {"questions": replies.questions}
    bring_from_repository(files.values())
    notes = watch_files(INPUTS / "evaluation", files)
    decided_by = {
        **models_in_use(work, params, artifacts),
        "decision": content_of(artifacts.decision) if artifacts.decision.is_dir() else None,
        "evaluation": params.evaluation.model_dump(mode="json"),
        "generation": params.generation.model_dump(mode="json"),
        "files": signature(INPUTS / "evaluation"),
        **({"held_out": replies.held_out} if asks else {}),
        "code": code_of("evaluation", work),
    }
    entry = work.entry("evaluation", decided_by)

    def make() -> None:
        from evaluation.tables import measure_tables

        check_dimensions(artifacts, ("heads",), params)
        work.note_use(artifacts.stage("evaluate"), entry)
        measure_tables(params, artifacts, work, entry.folder)

    numbers = {name: metrics / name for name in ("evaluation.json", "gill.json")}
    places = {"evaluation": artifacts.evaluation, **numbers}
    entry.provide(artifacts.stage("evaluate"), places, make)
    for note in notes:
        print(note)
