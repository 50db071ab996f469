"""Stage report: what the other stages wrote, on one page."""

from __future__ import annotations

from pathlib import Path

from gill.artifacts import ARTIFACTS, METRICS, Artifacts
from settings.params import Params
from stages.required import required
from workfolder import WorkFolder, code_of, content_of, file_md5


def run(params: Params, artifacts: Artifacts = ARTIFACTS, metrics: Path = METRICS) -> None:
    """Make artifacts/report/index.html, unless exactly this page is in the work folder."""
    read = {
        "captions": required(artifacts.captions.with_suffix(".report.json"), "prepare-captions"),
        "backbones": required(artifacts.backbones, "prepare-backbones"),
        "curve": required(metrics / "train", "train"),
        "evaluation": required(artifacts.evaluation, "evaluate"),
    }
    findings = artifacts.findings / "findings.json"
    presets = sorted(artifacts.presets.glob("*/artifacts/findings/findings.json"))
    work = WorkFolder.open(params.run.work)
    entry = work.entry(
        "report",
        {
            **{name: content_of(path) for name, path in read.items()},
            "decision": content_of(artifacts.decision) if artifacts.decision.is_dir() else None,
            "findings": file_md5(findings) if findings.is_file() else None,
            **({"presets": {str(path): file_md5(path) for path in presets}} if presets else {}),
            "params": params.model_dump(mode="json", exclude={"run"}),
            "code": code_of("report", work),
        },
    )

    def make() -> None:
        from evaluation.report.page import write_page

        write_page(params, entry.folder / "report" / "index.html", artifacts, metrics)

    entry.provide("report", {"report": artifacts.report.parent}, make)
    print(f"open {artifacts.report}")
