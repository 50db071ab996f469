"""Each table of the paper with our numbers beside the printed ones.

Where the five-seed run has a number, it is the mean over seeds ± their deviation, as in the paper's
tables; otherwise the main run's, ± the standard error over examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from evaluation.published import PUBLISHED
from evaluation.report.words import METHODS, METRICS, TABLES, set_name
from evaluation.results import Result
from evaluation.variants import BASELINE

# Metrics of which the tables show only some: the others are in results.json.
_HIDDEN = ("f1_gen", "f1_ret", "bleu_1", "bleu_2", "bleu_3")
ABSENT = Markup('<span class="mark quiet">absent</span>')

Place = tuple[str, str, str]
"""Set, method (or variant) and metric."""


@dataclass(frozen=True)
class Table:
    """Cells under column names, None where there is nothing; `note` says what was run on what."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    note: str = ""
    is_measured: bool = True
    """Whether any number in it is ours."""


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
    low: float | None = None
    high: float | None = None
    ceiling: float | None = None
    """What the texts tell at all."""

    @property
    def shown(self) -> str:
        """The value and what it is uncertain by."""
        if self.value is None:
            return ABSENT
        digits = 4 if self.metric == "seconds" else 3 if abs(self.value) < 100 else 1
        text = f"{self.value:.{digits}f}"
        return text if self.spread is None else f"{text} ± {self.spread:.{digits}f}"


def numbers_of(table: str, results: Sequence[Result], findings: Mapping[str, Any]) -> list[Number]:
    """Our numbers of a table: over seeds where there are several, else of the main run."""
    of_run = [
        Number(
            r.set, r.title, r.method, r.metric, r.value, r.standard_error,
            r.examples, r.of, 1, r.low, r.high, r.ceiling,
        )
        for r in results
        if r.table == table
    ]  # fmt: skip
    of_seeds = [
        over_seeds(row)
        for row in findings.get("numbers", ())
        if row["variant"] == BASELINE and row["table"] == table and len(row["values"]) > 1
    ]
    return list({(n.set, n.method, n.metric): n for n in (*of_run, *of_seeds)}.values())


def over_seeds(row: Mapping[str, Any]) -> Number:
    """A number of findings.json."""
    return Number(
        row["set"], row["title"], row["method"], row["metric"], row["mean"], row["deviation"],
        row["examples"], row["of"], len(row["values"]), row["low"], row["high"], row.get("ceiling"),
    )  # fmt: skip


def paper_tables(
    results: Sequence[Result],
    findings: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Table]:
    """Tables 1 to 8, section 5, the latency and what has no number in the paper; `presets` are the
    findings of GILL under other params, each a column."""
    tables = []
    for name, words in TABLES.items():
        if "variants" in words:
            tables.append(_ablation(name, findings))
            continue
        numbers = [n for n in numbers_of(name, results, findings) if n.metric not in _HIDDEN]
        note = words.get("note", "")
        beside = {
            preset: [
                over_seeds(row)
                for row in found["numbers"]
                if row["table"] == name and row["metric"] not in _HIDDEN
            ]
            for preset, found in (presets or {}).items()
        }
        if numbers or any(beside.values()):
            tables.append(compared(words["title"], name, numbers, note, beside))
        elif name.startswith("table_"):
            why = "not measured in this run: see the section on the real sets"
            tables.append(compared(words["title"], name, [], f"{note} Ours: {why}."))
    return tables


def compared(
    title: str,
    table: str,
    numbers: Sequence[Number],
    note: str,
    presets: Mapping[str, Sequence[Number]] | None = None,
) -> Table:
    """One row per context and method; per metric ours, those of other presets and, where it is
    printed, the paper's."""
    printed = _printed(table)
    ours = {(one.set, one.method, one.metric): one.shown for one in numbers}
    beside = {
        preset: {(n.set, n.method, n.metric): n.shown for n in of_preset if n.value is not None}
        for preset, of_preset in (presets or {}).items()
    }
    theirs = dict.fromkeys(place for places in beside.values() for place in places)
    metrics = [
        metric
        for metric in _ordered((key[2] for key in (*ours, *theirs, *printed)), METRICS)
        if any(n.value is not None and n.metric == metric for n in numbers)
        or any(key[2] == metric for key in (*theirs, *printed))
    ]
    with_paper = {metric for _, _, metric in printed}
    ceilings = {
        (one.set, one.method, one.metric): f"{one.ceiling:.3f}"
        for one in numbers
        if one.ceiling is not None
    }
    with_ceiling = {metric for _, _, metric in ceilings}
    with_preset = {preset: {metric for *_, metric in places} for preset, places in beside.items()}
    columns = ["", "who", "examples"]
    for metric in metrics:
        columns += [METRICS.get(metric, metric), *["ceiling"] * (metric in with_ceiling)]
        columns += [preset for preset in beside if metric in with_preset[preset]]
        columns += ["paper"] * (metric in with_paper)
    everything = [*numbers, *(n for of_preset in (presets or {}).values() for n in of_preset)]
    titles = {one.set: one.title for one in reversed(everything)}
    rows = []
    for set_, method in _pairs((*ours, *theirs), printed):
        row: list[str | None] = [titles.get(set_, set_name(set_)), METHODS.get(method, method)]
        row.append(_examples([n for n in everything if (n.set, n.method) == (set_, method)]))
        for metric in metrics:
            row.append(ours.get((set_, method, metric)))
            if metric in with_ceiling:
                row.append(ceilings.get((set_, method, metric)))
            row += [
                places.get((set_, method, metric))
                for preset, places in beside.items()
                if metric in with_preset[preset]
            ]
            if metric in with_paper:
                row.append(printed.get((set_, method, metric)))
        rows.append(row)
    noted = f"{note} {spread_note(numbers)}".strip()
    for preset, of_preset in (presets or {}).items():
        if of_preset:
            seeds = max(one.seeds for one in of_preset)
            noted += f" {preset}: under presets/{preset}.yaml, seeds: {seeds}."
    return Table(title, columns, rows, noted.strip(), is_measured=bool(everything))


def _ablation(table: str, findings: Mapping[str, Any]) -> Table:
    """Table 3, 4 or section 5: a row per variant; without ablations it says how to get them."""
    words, printed = TABLES[table], _printed(table)
    rows = findings.get("numbers", ())
    note = "Ours: not measured yet; `make ablations` trains them (about ten minutes)."
    ours: dict[Place, Number] = {}
    if any(row["variant"] != BASELINE or row["method"] == "generator" for row in rows):
        note = ""
        for row in rows:
            # The generator alone counts as a variant of its own.
            variant = row["variant"] if row["method"] == "gill" else row["method"]
            if variant in words["variants"] and row["mean"] is not None:
                ours[row["set"], variant, row["metric"]] = over_seeds(row)
    measured = {(set_, metric) for set_, _, metric in ours}
    shown = [
        (set_, metric)
        for set_ in ("captions", "story_5", "story_5_pictures")
        for metric in ("oracle_attributes", "clip_similarity", "fid")
        if (set_, metric) in measured
    ]
    on_paper = [
        (set_, metric)
        for set_, metric in (("captions", "fid"), ("story_5_pictures", "clip_similarity"))
        if any((set_, variant, metric) in printed for variant in words["variants"])
    ]
    columns = ["", *(f"{set_name(set_)}: {METRICS[metric]}" for set_, metric in shown)]
    columns += [
        f"paper, {'CC3M' if set_ == 'captions' else 'VIST'}: {METRICS[metric]}"
        for set_, metric in on_paper
    ]
    texts = {place: number.shown for place, number in ours.items()}
    body = [
        [
            name,
            *(texts.get((set_, variant, metric)) for set_, metric in shown),
            *(printed.get((set_, variant, metric)) for set_, metric in on_paper),
        ]
        for variant, name in words["variants"].items()
    ]
    used = [n for (set_, _, metric), n in ours.items() if (set_, metric) in shown]
    noted = f"{note} {spread_note(used)}".strip()
    return Table(words["title"], columns, body, noted, is_measured=bool(ours))


def spread_note(numbers: Sequence[Number]) -> str:
    """What stands behind ±."""
    seeds = {one.seeds for one in numbers if one.value is not None and one.spread is not None}
    parts = []
    if 1 in seeds:
        parts.append("One seed; ± standard error over examples.")
    if max(seeds, default=1) > 1:
        parts.append(f"± deviation over {max(seeds)} seeds.")
    return " ".join(parts)


def absences(results: Sequence[Result]) -> dict[str, str]:
    """Why a number of ours is absent, once for every metric."""
    why: dict[str, str] = {}
    for result in results:
        if result.absent:
            method = METHODS.get(result.method, result.method)
            who = f", {method}" if result.metric == "macro_f1" else ""
            why.setdefault(METRICS.get(result.metric, result.metric) + who, result.absent)
    return why


def _printed(table: str) -> dict[Place, str]:
    return {key[1:]: f"{number:g}" for key, number in PUBLISHED.items() if key[0] == table}


def _pairs(ours: Iterable[Place], printed: Iterable[Place]) -> list[tuple[str, str]]:
    """(set, method) in the order of ours, other printed models first within their set."""
    mine = dict.fromkeys(key[:2] for key in ours)
    others = dict.fromkeys(key[:2] for key in printed if key[:2] not in mine)
    sets = dict.fromkeys(set_ for set_, _ in (*mine, *others))
    return [pair for name in sets for pair in (*others, *mine) if pair[0] == name]


def _ordered(names: Iterable[str], order: Mapping[str, str]) -> list[str]:
    found = dict.fromkeys(names)
    return [n for n in order if n in found] + [n for n in found if n not in order]


def _examples(numbers: Sequence[Number]) -> str | None:
    if not numbers:
        return None
    one = numbers[0]
    return str(one.examples) if one.examples == one.of else f"{one.examples} of {one.of}"
