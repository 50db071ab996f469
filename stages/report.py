"""Stage report: what the other stages wrote, on one page."""

from __future__ import annotations

import time
from pathlib import Path

from gill.artifacts import ARTIFACTS, METRICS, Artifacts
from gill_errors import StageError
from settings.params import Params
from workfolder import WorkFolder, code_of, content_of, file_md5, place


def run(params: Params, artifacts: Artifacts = ARTIFACTS, metrics: Path = METRICS) -> None:
    """Make artifacts/report/index.html, unless exactly this page is in the work folder."""
    captions = artifacts.captions.with_suffix(".report.json")
    read = {
        "captions": (captions, "prepare-captions"),
        "backbones": (artifacts.backbones, "prepare-backbones"),
        "curve": (metrics / "train", "train"),
        "evaluation": (artifacts.evaluation, "evaluate"),
    }
    for path, stage in read.values():
        if not path.exists():
            raise StageError(f"{path} is missing: run `stages {stage}`")
    findings = artifacts.findings / "findings.json"
    work = WorkFolder.open(params.run.work)
    entry = work.entry(
        "report",
        {
            **{name: content_of(path) for name, (path, _) in read.items()},
            "decision": content_of(artifacts.decision) if artifacts.decision.is_dir() else None,
            "findings": file_md5(findings) if findings.is_file() else None,
            "params": params.model_dump(mode="json", exclude={"run"}),
            "code": code_of("report", work),
        },
    )
    with entry.alone():
        if entry.finished is None:
            from evaluation.report.page import write_page

            entry.begin()
            began = time.monotonic()
            write_page(params, entry.folder / "report" / "index.html", artifacts, metrics)
            entry.finish(["report"], time.monotonic() - began)
    place(entry.folder / "report", artifacts.report.parent)
    work.note_use("report", entry)
    print(f"open {artifacts.report}")
