"""Stage findings: the verdict on each finding of the paper, from all finished cells.

Nothing is trained or generated here: cells are read, compared and judged by `finding_claims`. With
one seed there is no verdict, only numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.cell_scores import CellScores, Term
from evaluation.finding_claims import CLAIMED, Finding, Part
from evaluation.metrics.paired import (
    all_of,
    judge,
    mean_interval,
    paired_difference,
    seed_difference,
)
from evaluation.metrics.uncertainty import mean_and_deviation
from evaluation.results import Result
from evaluation.variants import BASELINE, Cell, Study, cell, is_done
from gill.artifacts import ARTIFACTS, METRICS, Artifacts
from gill_errors import StageError


def run(
    params_file: Path, study: Study, artifacts: Artifacts = ARTIFACTS, metrics: Path = METRICS
) -> None:
    """Write artifacts/findings/findings.json, and the verdicts to metrics/findings.json.

    Raises StageError when no cell of these params is finished.
    """
    scores, cells = finished_cells(params_file, study, artifacts)
    content = {
        "cells": cells,
        "rule": CLAIMED.rule,
        "findings": [_judged(finding, scores) for finding in CLAIMED.findings],
        "numbers": _numbers(study, scores),
    }
    write(artifacts.findings / "findings.json", content)
    write(metrics / "findings.json", _short(content))
    for line in summary(content):
        print(line)


def finished_cells(
    params_file: Path, study: Study, artifacts: Artifacts
) -> tuple[CellScores, dict[str, Any]]:
    """The scores of a study's finished cells, and what was run.

    Raises StageError when no cell of these params is finished.
    """
    wanted = [cell(name, seed, artifacts) for name in study.variants for seed in study.seeds]
    finished = [one for one in wanted if is_done(params_file, study, one)]
    # There, but of other params or caches: never mixed with the ones of today.
    stale = sum(one.record.is_file() for one in wanted) - len(finished)
    if not finished:
        other = f" ({stale} are of other params or caches)" if stale else ""
        raise StageError(
            f"{artifacts.findings} has no finished cell{other}: run `stages run-variants`"
        )
    scores = CellScores(finished)
    return scores, _cells(wanted, finished, stale, scores)


def of_main_run(artifacts: Artifacts) -> dict[str, Any]:
    """The same numbers, as far as one evaluation has them, before any cell was run: no verdicts."""
    scores = CellScores([MainRun(BASELINE, 0, artifacts.root)])
    return {
        "cells": {"seeds": [0], "notes": []},
        "rule": CLAIMED.rule,
        "findings": [_judged(finding, scores) for finding in CLAIMED.findings],
        "numbers": [],
    }


class MainRun(Cell):
    """What `dvc repro` made, as the one cell that there is."""

    @property
    def artifacts(self) -> Artifacts:
        """Where the cell's own artifacts lie."""
        return Artifacts(self.folder)


def summary(content: dict[str, Any]) -> list[str]:
    """The verdicts as lines for people."""
    cells = content["cells"]
    lines = [f"{cells['finished']} of {cells['expected']} cells, seeds {cells['seeds']}"]
    for found in content["findings"]:
        verdicts = [f"{judge_}: {v or 'no verdict'}" for judge_, v in found["verdicts"].items()]
        lines.append(f"{found['number']}. {found['statement']}: {'; '.join(verdicts)}")
    return lines + cells["notes"]


def _judged(finding: Finding, scores: CellScores) -> dict[str, Any]:
    """A finding with the numbers of each of its claims and the verdict of each judge."""
    parts = [_measured(part, scores) for part in finding.parts]
    # An ordered set: verdicts stand in the order of the claims.
    judges = dict.fromkeys(metric for part in finding.parts for metric in part.metrics)
    # Recall at 1, 5 and 10 are one judge.
    groups: dict[str, list[str]] = {}
    for metric in judges:
        groups.setdefault("recall" if metric.startswith("recall") else metric, []).append(metric)
    verdicts = {}
    for name, group in groups.items():
        deciding = [
            part["by"].get(metric, {}).get("verdict")
            for part in parts
            for metric in part["metrics"]
            if metric in group and not part["beside"]
        ]
        # A claim that cannot be decided leaves its finding open, whatever the others say.
        verdicts[name] = None if None in deciding else all_of(deciding)
    return {
        "number": finding.number,
        "statement": finding.statement,
        "source": finding.source,
        "verdicts": verdicts,
        "parts": parts,
    }


def _measured(part: Part, scores: CellScores) -> dict[str, Any]:
    by = {}
    for metric in part.metrics:
        found = _compare(part, metric, scores)
        if found is not None:
            by[metric] = found
    return {
        "title": part.title,
        "claim": part.claim,
        "paper": part.printed,
        "beside": part.beside,
        "metrics": list(part.metrics),
        "by": by,
    }


def _compare(part: Part, metric: str, scores: CellScores) -> dict[str, Any] | None:
    """First and second mean, their difference with its interval, and the verdict on it."""
    terms = part.first + part.second
    # Per term [S, N], paired by example; or [S], where a number is of a whole run.
    tables: Sequence[np.ndarray] | None = scores.per_example(terms, metric)
    per_run = tables is None  # no single example has an F1
    if tables is None:
        tables = scores.per_run(terms, metric)
    if tables is None:
        return None
    weighted = [term.weight * table for term, table in zip(terms, tables, strict=True)]
    # A side may be several terms, such as a slope over ten rounds: the sum keeps the pairing.
    first = np.sum(weighted[: len(part.first)], axis=0)
    second = np.sum(weighted[len(part.first) :], axis=0) if part.second else np.zeros_like(first)
    seeds = len(first)
    found: dict[str, Any] = {
        "first": float(first.mean()),
        "second": float(second.mean()) if part.second else None,
        "difference": float((first - second).mean()),
        "seeds": seeds,
        "examples": None if per_run else first.shape[1],
        "verdict": None,
    }
    # Without examples only seeds can tell how far a number is from itself.
    if per_run and seeds < 2:
        return found
    difference = seed_difference(first, second) if per_run else paired_difference(first, second)
    found |= {"low": difference.low, "high": difference.high}
    if seeds > 1:
        found["verdict"] = judge(part.claim, difference, CLAIMED.margins[metric])
    return found


def _numbers(study: Study, scores: CellScores) -> list[dict[str, Any]]:
    """Every number of every variant over its seeds: mean, deviation, interval."""
    rows = []
    for name, variant in study.variants.items():
        seeds = scores.seeds([name])
        kept: dict[tuple[str, ...], list[Result]] = {}
        for seed in seeds:
            for result in scores.results(name, seed):
                key = (result.table, result.set, result.method, result.metric)
                kept.setdefault(key, []).append(result)
        for results in kept.values():
            rows.append({"variant": name, "variant_title": variant.title} | _over(results))
            term = Term(name, results[0].set, results[0].method)
            table = scores.per_example([term], results[0].metric)
            if table is not None:
                rows[-1]["low"], rows[-1]["high"] = mean_interval(table[0])
    return rows


def _over(results: Sequence[Result]) -> dict[str, Any]:
    """One number over seeds."""
    one = results[0]
    values = [result.value for result in results if result.value is not None]
    mean, deviation = mean_and_deviation(values) if values else (None, None)
    said = (
        *("table", "set", "title", "method", "metric", "examples", "of"),
        *("published", "absent", "ceiling"),
    )
    return {key: getattr(one, key) for key in said} | {
        "mean": mean, "deviation": deviation, "low": None, "high": None, "values": values
    }  # fmt: skip


def _cells(
    wanted: Sequence[Cell], finished: Sequence[Cell], stale: int, scores: CellScores
) -> dict[str, Any]:
    """What was run, when, with which code."""
    records = [scores.record(one.name, one.seed) for one in finished]
    codes = _distinct(record["code"] for record in records)
    notes = []
    if len(codes) > 1:
        notes.append(f"note: the cells were made with {len(codes)} versions of the code: {codes}")
    if stale:
        notes.append(f"note: {stale} cells are of other params or caches and were left out")
    if len(finished) + stale < len(wanted):
        absent = len(wanted) - len(finished) - stale
        notes.append(f"note: {absent} of {len(wanted)} cells are not there")
    return {
        "expected": len(wanted),
        "finished": len(finished),
        "seeds": _distinct(one.seed for one in finished),
        "code": codes,
        "versions": records[0]["versions"],
        "first": min(record["finished"] for record in records),
        "last": max(record["finished"] for record in records),
        "core_seconds": sum(sum(record["seconds"].values()) for record in records),
        "notes": notes,
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values))


def _short(content: dict[str, Any]) -> dict[str, Any]:
    """Verdicts and the deciding numbers, for git."""
    short: dict[str, Any] = {"seeds": len(content["cells"]["seeds"])}
    for found in content["findings"]:
        short[f"finding_{found['number']}"] = {
            "verdicts": found["verdicts"],
            "parts": {
                part["title"]: {
                    metric: {
                        key: round(by[key], 4) if isinstance(by[key], float) else by[key]
                        for key in ("first", "second", "difference", "low", "high", "verdict")
                        if by.get(key) is not None
                    }
                    for metric, by in part["by"].items()
                }
                for part in found["parts"]
                if not part["beside"]
            },
        }
    return short


def write(path: Path, content: Any) -> None:
    """Write JSON for people too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
