"""Stage fit-decision: the retrieve-or-generate classifier (section 3.3, appendix C)."""

from __future__ import annotations

from pathlib import Path

from gill.artifacts import ARTIFACTS, INPUTS, METRICS, Artifacts
from gill.dimensions import check_dimensions
from settings.params import Params
from stages.models_in_use import models_in_use
from workfolder import WorkFolder, bring_from_repository, code_of, content_of, file_md5, watch_files


def run(params: Params, artifacts: Artifacts = ARTIFACTS, metrics: Path = METRICS) -> None:
    """Make artifacts/decision, unless exactly this classifier is in the work folder."""
    check_dimensions(artifacts, (), params)
    work = WorkFolder.open(params.run.work)
    votes, given = params.decision.votes, params.training.weights
    bring_from_repository([votes])
    watch_files(INPUTS / "decision", {"votes": votes})
    decided_by = {
        **models_in_use(work, params, artifacts),
        "votes": file_md5(Path(votes)) if votes is not None and Path(votes).is_file() else votes,
        "decision": params.decision.model_dump(mode="json", exclude={"votes"}),
        "weights": content_of(Path(given)) if given and Path(given).exists() else given,
        "code": code_of("decision", work),
    }
    if params.is_miniature and votes is None:
        decided_by["generation"] = params.generation.model_dump(mode="json")
    entry = work.entry("decision", decided_by)

    def make() -> None:
        from stages.decision_labels import make_decision

        check_dimensions(artifacts, ("heads",), params)
        make_decision(params, artifacts, entry.folder / "decision", entry.folder / "decision.json")

    places = {"decision": artifacts.decision, "decision.json": metrics / "decision.json"}
    entry.provide(artifacts.stage("fit-decision"), places, make)
