"""The chart of a finding: the difference of each claim with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.finding_claims import CLAIMED
from evaluation.report.curves import COLOURS, INK, as_uri, drawn
from evaluation.report.words import METRICS

_LIMIT = 12  # lines of a chart; what stands beside a finding goes first


def measured_parts(finding: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The claims of a finding of findings.json that have a number, the deciding ones first.

    None where no deciding one has.
    """
    parts = [part for part in finding["parts"] if part["by"]]
    if all(part["beside"] for part in parts):
        return []
    return sorted(parts, key=lambda part: part["beside"])[:_LIMIT]


def draw_differences(finding: Mapping[str, Any], *, dark: bool) -> str:
    """An SVG data URI: a line per claim, its 95% intervals by every judge.

    Right of nought is in favour of the claim; the shade is what counts as no difference.
    """
    parts = measured_parts(finding)
    metrics = list(dict.fromkeys(metric for part in parts for metric in part["by"]))
    ink = INK[dark]
    with drawn(finding["statement"], (5.6, 0.5 + 0.46 * len(parts)), dark=dark) as (axes, svg):
        margin = CLAIMED.margins[metrics[0]]
        axes.axvspan(-margin, margin, color=ink, alpha=0.08, linewidth=0)
        axes.axvline(0, color=ink, linewidth=0.8, alpha=0.5)
        for row, part in enumerate(parts):
            label = part["title"] + (" (beside)" if part["beside"] else "")
            axes.annotate(
                label, (0, row - 0.36), xycoords=("axes fraction", "data"), fontsize=9, color=ink
            )
            for number, metric in enumerate(_drawn_metrics(part, metrics)):
                _draw_interval(
                    axes, part["by"][metric], row + 0.16 * number, COLOURS[dark][number % 4]
                )
        axes.set_ylim(len(parts) - 0.45, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"difference of {_judges(metrics)}", fontsize=9)
    return as_uri(svg)


def _drawn_metrics(part: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    return [metric for metric in metrics if metric in part["by"]]


def _judges(metrics: Sequence[str]) -> str:
    """The judges of a chart in words, in the order of their colours."""
    colours = ("blue", "orange")
    if {"oracle_attributes", "clip_similarity"} == set(metrics):
        return " and ".join(
            f"{METRICS[metric]} ({colour})" for metric, colour in zip(metrics, colours)
        )
    return METRICS.get(metrics[0], metrics[0]) if len(metrics) == 1 else "recall"


def _draw_interval(axes: Any, by: Mapping[str, Any], y: float, colour: str) -> None:
    if "low" in by:
        axes.plot([by["low"], by["high"]], [y, y], color=colour, linewidth=2.4, alpha=0.6)
    axes.plot([by["difference"]], [y], "o", color=colour, markersize=4.5)
