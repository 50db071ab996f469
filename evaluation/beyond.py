"""Beyond the paper: the tables of a study that asks what the paper leaves open.

A study of findings/ with `tables` has no claims: its numbers are shown with their intervals over
seeds and examples, and nobody judges them. They lie in artifacts/findings/tables/STUDY.json, from
where the report takes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evaluation.cell_scores import CellScores, Term
from evaluation.findings import finished_cells, write
from evaluation.metrics.paired import mean_interval, seed_difference
from evaluation.variants import Study, StudyTable
from gill.artifacts import ARTIFACTS, Artifacts


def run(params_file: Path, study: Study, name: str, artifacts: Artifacts = ARTIFACTS) -> None:
    """Write the tables of the study `name` and print them.

    Raises StageError when no cell of these params is finished.
    """
    scores, cells = finished_cells(params_file, study, artifacts)
    tables = [_table(table, study, scores) for table in study.tables]
    write(artifacts.findings / "tables" / f"{name}.json", {"cells": cells, "tables": tables})
    for table in tables:
        print("\n".join(as_lines(table)))
    print("\n".join(cells["notes"]))


def as_lines(table: dict[str, Any]) -> list[str]:
    """A table as Markdown."""
    rows = [["", *table["columns"]], ["---"] * (1 + len(table["columns"]))]
    rows += [[str(cell or "–") for cell in row] for row in table["rows"]]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"{table['title']} ({table['note']})", "", *lines, ""]


def _table(table: StudyTable, study: Study, scores: CellScores) -> dict[str, Any]:
    rows, seeds = [], set[int]()
    named = table.rows or {variant.title: name for name, variant in study.variants.items()}
    for title, word in named.items():
        cells = []
        for pattern in table.columns.values():
            shown, number = _cell(pattern.replace("*", word).split("/"), scores)
            cells.append(shown)
            seeds |= {number} if shown else set()
        if any(cells):
            rows.append([title, *cells])
    numbers = " or ".join(map(str, sorted(seeds))) + " seed" + "s" * (seeds != {1})
    return {
        "title": table.title,
        "note": f"{table.note} Mean and 95% interval, {numbers}.".strip(),
        "columns": list(table.columns),
        "rows": rows,
    }


def _cell(place: list[str], scores: CellScores) -> tuple[str | None, int]:
    """A number as it is shown, and over how many seeds; None where no cell has it."""
    variant, set_, method, metric, *ceiling = place
    results = [
        result
        for seed in scores.seeds([variant])
        for result in scores.results(variant, seed)
        if (result.set, result.method, result.metric) == (set_, method, metric)
        and result.value is not None
    ]
    values = np.array([one.ceiling if ceiling else one.value for one in results], np.float64)
    if not len(values) or np.isnan(values).any():
        return None, 0
    digits = 0 if metric == "prompts" else 3
    mean = f"{values.mean():.{digits}f}"
    if ceiling:  # the same examples for every seed
        return mean, len(values)
    table = scores.per_example([Term(variant, set_, method)], metric)
    if table is not None:
        low, high = mean_interval(table[0])
    elif len(values) > 1:
        _, low, high = seed_difference(values, np.zeros_like(values))
    else:
        return mean, 1
    return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]", len(values)
