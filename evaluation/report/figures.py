"""Figures 6 and 8 with intervals, and the training curves."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.published import published
from evaluation.report.curves import Curves, Line
from evaluation.report.html import Drawings
from evaluation.report.tables import Number, numbers_of, spread_note
from evaluation.report.words import METRICS
from evaluation.results import Result

_LOSSES = {
    "captioning": "Captioning loss",
    "image_token": "[IMG] token loss",
    "generation": "Generation loss",
    "text_to_image": "Retrieval loss, picture for text",
    "text_to_image_r1": "R@1 on held-out rows",
}
# Line name, pattern of its sets, method, table of the printed ends; equal colours belong together.
_FIGURE_6 = (
    ("GILL, captions and pictures", r"story_(\d)_pictures", "gill"),
    ("GILL, captions", r"story_(\d)", "gill"),
    ("generator alone, captions", r"story_(\d)", "generator"),
)
_FIGURE_8 = (
    ("GILL", r"dialogue_(\d+)", "gill"),
    ("generator alone", r"dialogue_(\d+)", "generator"),
)


def figures(results: Sequence[Result], findings: Mapping[str, Any]) -> list[Drawings]:
    """Figure 6 and Figure 8, by the oracle where it judges and by CLIP similarity."""
    drawn = []
    for table, printed, title, axis, lines in (
        ("figure_6", "table_1", "Figure 6: stories (VIST)", "captions of the story", _FIGURE_6),
        ("figure_8", "table_2", "Figure 8: dialogues (VisDial)", "rounds of the dialogue",
         _FIGURE_8),
    ):  # fmt: skip
        numbers = numbers_of(table, results, findings)
        curves = [
            one
            for metric in ("oracle_attributes", "clip_similarity")
            if (one := _curves(metric, axis, lines, numbers, printed)) is not None
        ]
        if curves:
            note = f"Bands: 95% intervals. {spread_note(numbers)}"
            drawn.append(
                Drawings(curves, title, note.replace("; ± standard error over examples", ""))
            )
    return drawn


def _curves(
    metric: str,
    axis: str,
    lines: Sequence[tuple[str, str, str]],
    numbers: Sequence[Number],
    printed: str,
) -> Curves | None:
    drawn = []
    for colour, (name, pattern, method) in enumerate(lines):
        points = sorted(
            (int(match[1]), one)
            for one in numbers
            if one.method == method and one.metric == metric and one.value is not None
            if (match := re.fullmatch(pattern, one.set))
        )
        if points:
            drawn.append(_line(name, points, colour))
        on_paper = sorted(
            (int(match[1]), value)
            for n in range(1, 11)
            for set_ in (f"story_{n}", f"story_{n}_pictures", f"dialogue_{n}")
            if (match := re.fullmatch(pattern, set_))
            and (value := published(printed, set_, method, metric)) is not None
        )
        if points and on_paper:
            x, y = zip(*on_paper, strict=True)
            drawn.append(Line(f"{name}: paper", x, y, style="published", colour=colour))
    if not drawn:
        return None
    note = (
        "The paper's points are of the real sets, with another CLIP: compare their shape alone."
        if any(line.style == "published" for line in drawn)
        else ""
    )
    return Curves(METRICS[metric], axis, METRICS[metric], drawn, note)


def _line(name: str, points: Sequence[tuple[int, Number]], colour: int) -> Line:
    low = [one.low for _, one in points if one.low is not None]
    high = [one.high for _, one in points if one.high is not None]
    whole = len(low) == len(high) == len(points)
    return Line(
        name,
        [x for x, _ in points],
        [one.value for _, one in points if one.value is not None],
        low if whole else None,
        high if whole else None,
        colour=colour,
    )


def training_curves(folder: Path) -> Drawings:
    """What the stage train logged."""
    curves = []
    for name, title in _LOSSES.items():
        lines = [
            Line(kind, *_read_curve(folder / kind / f"{name}.tsv"), colour=colour)
            for colour, kind in enumerate(("train", "validation"))
            if (folder / kind / f"{name}.tsv").is_file()
        ]
        if lines:
            curves.append(Curves(title, "step", "", lines))
    return Drawings(curves, "Training")


def _read_curve(path: Path) -> tuple[list[float], list[float]]:
    with path.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    return [float(row["step"]) for row in rows], [float(row[path.stem]) for row in rows]
