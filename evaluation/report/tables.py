"""Each table of the paper with our numbers beside the printed ones.

Where the five-seed run has a number, it is the mean over seeds ± their deviation, as in the paper's
tables; otherwise the main run's, ± the standard error over examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.published import PUBLISHED
from evaluation.report.html import Facts, Mark, Table, Value
from evaluation.report.words import METRICS, NOTES, TABLES, method_name, set_name
from evaluation.results import Result
from evaluation.variants import BASELINE

# Metrics of which the tables show only some: the others are in results.json.
_HIDDEN = ("f1_gen", "f1_ret", "bleu_1", "bleu_2", "bleu_3")


@dataclass(frozen=True)
class Number:
    """One number of ours: of one run, or over seeds."""

    set: str
    title: str
    method: str
    metric: str
    value: float | None
    spread: float | None
    """Standard error of one run, deviation over several seeds."""
    examples: int
    of: int
    seeds: int
    absent: str | None
    low: float | None = None
    high: float | None = None


def numbers_of(table: str, results: Sequence[Result], findings: Mapping[str, Any]) -> list[Number]:
    """Our numbers of a table: over seeds where there are several, else of the main run."""
    found = [
        Number(
            r.set, r.title, r.method, r.metric, r.value, r.standard_error,
            r.examples, r.of, 1, r.absent, r.low, r.high,
        )
        for r in results
        if r.table == table
    ]  # fmt: skip
    over = [
        over_seeds(row)
        for row in findings.get("numbers", ())
        if row["variant"] == BASELINE and row["table"] == table and len(row["values"]) > 1
    ]
    better = {(one.set, one.method, one.metric): one for one in over}
    found = [better.pop((one.set, one.method, one.metric), one) for one in found]
    return found + list(better.values())


def over_seeds(row: Mapping[str, Any]) -> Number:
    """A number of findings.json."""
    return Number(
        row["set"], row["title"], row["method"], row["metric"], row["mean"], row["deviation"],
        row["examples"], row["of"], len(row["values"]), row["absent"], row["low"], row["high"],
    )  # fmt: skip


def paper_tables(results: Sequence[Result], findings: Mapping[str, Any]) -> list[Table]:
    """Tables 1, 2, 5 to 8, the latency and what has no number in the paper."""
    tables = []
    for name, title in TABLES.items():
        numbers = [n for n in numbers_of(name, results, findings) if n.metric not in _HIDDEN]
        if numbers:
            tables.append(compared(title, name, numbers, NOTES.get(name, "")))
        elif name.startswith("table_"):
            why = "not measured in this run: see the section on the real sets"
            tables.append(compared(title, name, [], f"{NOTES.get(name, '')} Ours: {why}."))
    return tables


def compared(title: str, table: str, numbers: Sequence[Number], note: str) -> Table:
    """One row per context and method; per metric ours and, where it is printed, the paper's."""
    printed = {key[1:]: number for key, number in PUBLISHED.items() if key[0] == table}
    ours = {(one.set, one.method, one.metric): one for one in numbers}
    metrics = [
        metric
        for metric in _ordered((key[2] for key in (*ours, *printed)), METRICS)
        if any(n.value is not None and n.metric == metric for n in numbers)
        or any(key[2] == metric for key in printed)
    ]
    with_paper = {metric for _, _, metric in printed}
    columns = ["", "who", "examples"]
    for metric in metrics:
        name = METRICS.get(metric, metric)
        columns += [name, "paper"] if metric in with_paper else [name]
    titles = {one.set: one.title for one in numbers}
    rows: list[list[Value]] = []
    for set_, method in _pairs(ours, printed):
        row: list[Value] = [titles.get(set_, set_name(set_)), method_name(method)]
        row.append(_examples([n for n in numbers if (n.set, n.method) == (set_, method)]))
        for metric in metrics:
            row.append(_ours(ours.get((set_, method, metric))))
            if metric in with_paper:
                row.append(_printed(printed.get((set_, method, metric))))
        rows.append(row)
    return Table(title, columns, rows, f"{note} {spread_note(numbers)}".strip())


def spread_note(numbers: Sequence[Number]) -> str:
    """What stands behind ±."""
    shown = [one for one in numbers if one.value is not None]
    parts = []
    seeds = {one.seeds for one in shown if one.spread is not None}
    if 1 in seeds:
        parts.append("One seed; ± standard error over examples.")
    if max(seeds, default=1) > 1:
        parts.append(f"± deviation over {max(seeds)} seeds.")
    return " ".join(parts)


def absences(results: Sequence[Result]) -> Facts:
    """Why a number of ours is absent, once for every metric."""
    why: dict[str, str] = {}
    for result in results:
        if result.absent:
            who = f", {method_name(result.method)}" if result.metric == "macro_f1" else ""
            why.setdefault(METRICS.get(result.metric, result.metric) + who, result.absent)
    return Facts(why, "Why a number is absent")


def _pairs(
    ours: Mapping[tuple[str, str, str], Number], printed: Mapping[tuple[str, str, str], float]
) -> list[tuple[str, str]]:
    """(set, method) in the order of ours, other printed models first within their set."""
    sets = dict.fromkeys([key[0] for key in ours] + [key[0] for key in printed])
    pairs = []
    for name in sets:
        mine = dict.fromkeys(key[1] for key in ours if key[0] == name)
        others = dict.fromkeys(k[1] for k in printed if k[0] == name and k[1] not in mine)
        pairs += [(name, method) for method in (*others, *mine)]
    return pairs


def _ordered(names: Iterable[str], order: Mapping[str, str]) -> list[str]:
    found = dict.fromkeys(names)
    return [n for n in order if n in found] + [n for n in found if n not in order]


def _examples(numbers: Sequence[Number]) -> Value:
    if not numbers:
        return None
    one = numbers[0]
    return str(one.examples) if one.examples == one.of else f"{one.examples} of {one.of}"


def _ours(number: Number | None) -> Value:
    if number is None:
        return None
    if number.value is None:
        return Mark("absent", "quiet")
    digits = 3 if abs(number.value) < 100 else 1
    if number.metric == "seconds":
        digits = 4
    text = f"{number.value:.{digits}f}"
    return text if number.spread is None else f"{text} ± {number.spread:.{digits}f}"


def _printed(value: float | None) -> Value:
    return None if value is None else f"{value:g}"
