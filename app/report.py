"""The report: one self-contained HTML page of facts, tables, curves and grids of pictures.

    facts, tables, curves, grids -> render -> HTML (no script, no font and no picture from outside)

Nothing here computes a result: the page shows what the stages wrote.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

matplotlib.use("agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers under column names; `note` says what was run on what."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    note: str = ""


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis: name -> (x, y)."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: a picture, a text, or both; `good` colours a judged caption."""

    picture: Image.Image | Path | None = None
    text: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Grid:
    """Pictures beside their contexts: one row per example."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Everything on the report."""

    title: str
    lead: str
    facts: dict[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    curves: Sequence[Curves] = ()
    grids: Sequence[Grid] = ()


def write_report(path: str | Path, page: Page) -> None:
    """Write the page as one HTML file, pictures and curves inside it."""
    environment = Environment(loader=PackageLoader("app"), autoescape=select_autoescape(["html"]))
    environment.filters["picture"] = _picture_uri
    environment.filters["number"] = _number
    environment.filters["drawing"] = _draw
    html = environment.get_template("report.html").render(page=page)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(html, encoding="utf-8")


def _number(value: str | float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _picture_uri(picture: Image.Image | Path) -> str:
    """A data URI: PNG for small pictures, JPEG of at most 256 pixels for large ones."""
    image = Image.open(picture) if isinstance(picture, Path) else picture
    buffer = io.BytesIO()
    if max(image.size) <= 64:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.convert("RGB")
        image.thumbnail((256, 256))
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _draw(curves: Curves) -> str:
    """The curves as an SVG data URI."""
    figure, axes = plt.subplots(figsize=(5.2, 3.0))
    for name, (x, y) in curves.lines.items():
        axes.plot(
            x, y, label=name, linewidth=1.4, marker="o" if len(x) < 15 else None, markersize=4
        )
    axes.set_xlabel(curves.x_label)
    axes.set_ylabel(curves.y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
