"""Figures 6 and 8 with intervals, and the training curves."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.published import PUBLISHED
from evaluation.report.curves import Curves, Line
from evaluation.report.tables import Number, numbers_of, spread_note
from evaluation.report.words import FIGURES, LOSSES, METRICS
from evaluation.results import Result


class Figure(NamedTuple):
    """A figure of the paper, drawn by several judges."""

    title: str
    curves: list[Curves]
    note: str


def figures(results: Sequence[Result], findings: Mapping[str, Any]) -> list[Figure]:
    """Figure 6 and Figure 8, by the oracle where it judges and by CLIP similarity."""
    drawn = []
    for table, figure in FIGURES.items():
        numbers = numbers_of(table, results, findings)
        curves = [
            Curves(METRICS[metric], figure["axis"], METRICS[metric], lines)
            for metric in ("oracle_attributes", "clip_similarity")
            if (lines := _lines(figure, metric, numbers))
        ]
        if curves:
            note = f"Bands: 95% intervals. {spread_note(numbers)}"
            note = note.replace("; ± standard error over examples", "")
            drawn.append(Figure(figure["title"], curves, note))
    return drawn


def _lines(figure: Mapping[str, Any], metric: str, numbers: Sequence[Number]) -> list[Line]:
    """Of each method ours and, where it is printed, the paper's in the same colour."""
    lines = []
    for colour, line in enumerate(figure["lines"]):
        name, pattern, method = line["name"], line["sets"], line["method"]
        ours = {
            int(place[1]): one
            for one in numbers
            if (one.method, one.metric) == (method, metric) and one.value is not None
            if (place := re.fullmatch(pattern, one.set))
        }
        if not ours:
            continue
        x = sorted(ours)
        y, low, high = ([getattr(ours[n], end) for n in x] for end in ("value", "low", "high"))
        band = None if None in low + high else (low, high)
        lines.append(Line(name, x, y, band, colour=colour))
        on_paper = {
            int(place[1]): value
            for (table, set_, *judged), value in PUBLISHED.items()
            if (table, *judged) == (figure["printed"], method, metric)
            if (place := re.fullmatch(pattern, set_))
        }
        if on_paper:
            x = sorted(on_paper)
            y = [on_paper[n] for n in x]
            lines.append(Line(f"{name}: paper", x, y, is_published=True, colour=colour))
    return lines


def training_curves(folder: Path) -> list[Curves]:
    """What the stage train logged."""
    curves = []
    for name, title in LOSSES.items():
        lines = [
            Line(kind, *_read_curve(folder / kind / f"{name}.tsv"), colour=colour)
            for colour, kind in enumerate(("train", "validation"))
            if (folder / kind / f"{name}.tsv").is_file()
        ]
        if lines:
            curves.append(Curves(title, "step", "", lines))
    return curves


def _read_curve(path: Path) -> tuple[list[float], list[float]]:
    with path.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    return [float(row["step"]) for row in rows], [float(row[path.stem]) for row in rows]
