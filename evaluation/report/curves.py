"""Lines with intervals as SVG, for light and for dark pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

COLOURS = {
    False: ("#1f6feb", "#d4691c", "#1a7f5a", "#8250df"),
    True: ("#6ea8fe", "#f4a261", "#58c99b", "#c297ff"),
}
INK = {False: "#1d2330", True: "#e6e9ef"}


@dataclass(frozen=True)
class Line:
    """Points of one line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """The lower and the upper ends of an interval around each."""
    is_published: bool = False
    colour: int = 0
    """The number of a colour that another line may have too."""


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]


def draw(curves: Curves, *, dark: bool) -> str:
    """The curves as an SVG data URI without a background."""
    with drawn(curves.title, (5.2, 3.2), dark=dark) as (axes, svg):
        for line in curves.lines:
            _draw_line(axes, line, COLOURS[dark][line.colour])
        axes.set_xlabel(curves.x_label)
        axes.set_ylabel(curves.y_label)
        axes.grid(alpha=0.25)
        whole = [x for line in curves.lines for x in line.x]
        if whole and max(whole) <= 12 and all(float(x).is_integer() for x in whole):
            axes.set_xticks(range(int(min(whole)), int(max(whole)) + 1))
        if len(curves.lines) > 2:  # below: no line is hidden
            below: Any = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.16), "ncol": 2}
            axes.legend(frameon=False, fontsize=8.5, **below)
        elif len(curves.lines) == 2:
            axes.legend(frameon=False, fontsize=8.5)
    return as_uri(svg)


@contextmanager
def drawn(
    title: str, inches: tuple[float, float], *, dark: bool
) -> Iterator[tuple[plt.Axes, io.BytesIO]]:
    """Axes to draw on, and the SVG without a background that is there afterwards."""
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.color": INK[dark],
        "axes.labelcolor": INK[dark],
        "axes.edgecolor": INK[dark],
        "xtick.color": INK[dark],
        "ytick.color": INK[dark],
        "font.family": "sans-serif",
        "font.size": 10,
    }
    svg = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(figsize=inches)
        axes.spines[["top", "right"]].set_visible(False)
        yield axes, svg
        nothing: Any = {"Date": None}
        figure.savefig(svg, format="svg", bbox_inches="tight", transparent=True, metadata=nothing)
        plt.close(figure)


def as_uri(svg: io.BytesIO) -> str:
    """A data URI of what `drawn` has left."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"


def _draw_line(axes: plt.Axes, line: Line, colour: str) -> None:
    if line.is_published:
        axes.plot(
            line.x, line.y, "--", label=line.name, color=colour, linewidth=0.8, alpha=0.9,
            marker="D", markersize=5, markerfacecolor="none",
        )  # fmt: skip
        return
    marker = "o" if len(line.x) < 15 else None
    axes.plot(
        line.x, line.y, label=line.name, color=colour, linewidth=1.6, marker=marker, markersize=4
    )
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=colour, alpha=0.18, linewidth=0)
