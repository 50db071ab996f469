"""The report: what the stages wrote, on one page.

findings · the paper's tables · Tables 3 and 4 · figures · pictures · failures · what was run
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import findings
from evaluation.report.facts import facts_section, real_sets_section
from evaluation.report.figures import figures, training_curves
from evaluation.report.findings import ablation_tables, findings_section
from evaluation.report.grids import answers, failures, grids
from evaluation.report.html import Block, Page, Section, Table, write_report
from evaluation.report.tables import absences, paper_tables
from evaluation.results import Record, Result, read_records, read_results
from gill.artifacts import Artifacts
from settings.params import Params


@dataclass(frozen=True)
class _Written:
    """What the stages before this one left."""

    results: Sequence[Result]
    records: Sequence[Record]
    findings: dict[str, Any]


def write_page(params: Params, path: Path, artifacts: Artifacts, metrics: Path) -> None:
    """Write the page to `path`."""
    written = _read(artifacts)
    is_miniature = params.captions.table == "miniature"
    sections = [
        findings_section(written.findings),
        Section(
            "tables",
            "The paper's tables",
            "Ours beside the printed number. "
            + ("The printed ones are of the real sets and models: compare directions, not values. "
               "Right attributes: the share of place, colour, shape, size and side that an oracle "
               "reads off the generated picture. CLIP similarity: the cosine of generated and real "
               "picture in the run's own visual encoder." if is_miniature else ""),
            [*_in_order(written), absences(written.results)],
        ),
        Section(
            "figures",
            "Figures",
            "",
            [*figures(written.results, written.findings),
             training_curves(metrics / "train" / "plots" / "metrics")],
        ),
        *_picture_sections(written.records, params.evaluation.examples_shown),
        _inputs(params, artifacts, written),
        real_sets_section(),
    ]  # fmt: skip
    write_report(path, _page(params, is_miniature, sections))


def _page(params: Params, is_miniature: bool, sections: Sequence[Section]) -> Page:
    if is_miniature:
        lead = (
            "Run on the miniature world: 32x32 pictures of one object, tiny frozen models. These "
            "numbers say that the method works here, and nothing about photographs."
        )
        badge = "miniature world"
    else:
        lead, badge = f"Run on {params.captions.table}.", ""
    return Page("GILL: what was trained and how well it works", lead, badge, sections)


def _in_order(written: _Written) -> list[Table]:
    """The paper's tables, Tables 3 and 4 in their places."""
    tables = paper_tables(written.results, written.findings)
    *numbered, last = ablation_tables(written.findings)
    place = 1 + max(i for i, table in enumerate(tables) if table.title.startswith("Table 2"))
    return [*tables[:place], *numbered, last, *tables[place:]]


def _picture_sections(records: Sequence[Record], limit: int) -> list[Section]:
    shown: list[Block] = [*grids(records, limit), *answers(records, limit)]
    return [
        Section(
            "pictures",
            "Pictures with their contexts",
            "The first held-out examples of each set, not chosen: context, real picture, nearest "
            "candidate, and what both methods generate from the same seed.",
            shown,
        ),
        Section("failures", "Failures", "GILL at its worst.", failures(records)),
    ]


def _inputs(params: Params, artifacts: Artifacts, written: _Written) -> Section:
    """What was run, and what was left out of the caption table."""
    section = facts_section(params, artifacts, written.findings)
    report = artifacts.captions.with_suffix(".report.json")
    captions = json.loads(report.read_text(encoding="utf-8"))
    if not captions["excluded"]:
        return section
    left_out = Table(
        "Rows left out of the caption table",
        ["reason", "rows"],
        list(captions["reasons"].items()),
        f"Every one is named in {artifacts.captions.with_suffix('.excluded.tsv')}.",
    )
    return Section(section.name, section.title, section.note, [*section.blocks, left_out])


def _read(artifacts: Artifacts) -> _Written:
    results = read_results(artifacts.evaluation / "results.json")
    records = read_records(artifacts.evaluation / "records.parquet")
    judged = artifacts.findings / "findings.json"
    if judged.is_file():
        content = json.loads(judged.read_text(encoding="utf-8"))
    else:
        content = findings.of_main_run(artifacts)
    return _Written(results, records, content)
