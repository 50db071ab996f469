"""The report: one self-contained HTML page of sections with tables, curves and grids of pictures.

    sections of blocks -> render -> HTML (no script, no font and no picture from outside)

Nothing here computes a result: the page shows what the stages wrote. Pictures become smaller until
the page is under 10 MB.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape
from PIL import Image

from evaluation.report.curves import Curves, draw
from gill_errors import GillError

LARGEST_PAGE = 10_000_000
_SIDES = (256, 160, 96, 64)

Tone = Literal["good", "bad", "quiet", "plain"]


class ReportError(GillError):
    """A page that cannot be written; the message says why."""


@dataclass(frozen=True)
class Mark:
    """A text with a colour: a verdict, or a remark on an absent number."""

    text: str
    tone: Tone = "plain"


Value = str | float | int | Mark | None


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers under column names; `note` says what was run on what."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    note: str = ""
    folded: bool = False
    """Shown on a click only."""
    kind: str = "table"


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: words and pictures in their order, and a judged line below them."""

    parts: Sequence[str | Image.Image] = ()
    text: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Grid:
    """Pictures beside their contexts: one row per example."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    kind: str = "grid"


@dataclass(frozen=True)
class Drawings:
    """Curves side by side."""

    curves: Sequence[Curves]
    title: str = ""
    note: str = ""
    kind: str = "drawings"


@dataclass(frozen=True)
class Facts:
    """Names and what they stand for."""

    facts: dict[str, str]
    title: str = ""
    note: str = ""
    kind: str = "facts"


@dataclass(frozen=True)
class Text:
    """Lines of a file or a shell, as they are."""

    lines: str
    title: str = ""
    note: str = ""
    folded: bool = False
    kind: str = "text"


Block = Table | Grid | Drawings | Facts | Text


@dataclass(frozen=True)
class Section:
    """A heading, what it says, and its blocks."""

    name: str
    """Of its link."""
    title: str
    note: str = ""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Page:
    """Everything on the report."""

    title: str
    lead: str
    badge: str = ""
    sections: Sequence[Section] = field(default_factory=tuple)


def write_report(path: str | Path, page: Page) -> None:
    """Write the page as one HTML file, pictures and curves inside it.

    Raises ReportError when even with the smallest pictures it is over 10 MB.
    """
    for side in _SIDES:
        html = render(page, side).encode("utf-8")
        if len(html) <= LARGEST_PAGE:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(html)
            return
    raise ReportError(
        f"the report is {len(html) / 1e6:.1f} MB with pictures of {_SIDES[-1]} pixels; at most "
        f"{LARGEST_PAGE / 1e6:.0f} are wanted: show fewer (evaluation.examples_shown)"
    )


def render(page: Page, side: int = _SIDES[0]) -> str:
    """The page as HTML, pictures at most `side` pixels wide and high."""
    environment = Environment(
        loader=PackageLoader("evaluation.report", "."),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = partial(_picture_uri, side=side)
    environment.filters["number"] = _number
    environment.filters["coded"] = _coded
    environment.filters["light"] = partial(draw, dark=False)
    environment.filters["dark"] = partial(draw, dark=True)
    environment.tests["mark"] = lambda value: isinstance(value, Mark)
    environment.tests["figure"] = _is_figure
    environment.tests["words"] = lambda value: isinstance(value, str)
    return environment.get_template("report.html").render(page=page)


def _number(value: str | float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _is_figure(value: Value) -> bool:
    """Whether a value is set as a number: a text like `0.612 ± 0.001` or `+0.1 [0, +0.2]`."""
    if isinstance(value, str):
        return re.fullmatch(r"[-+]?[0-9][-+0-9., ±\[\]]*", value) is not None
    return isinstance(value, int | float)


def _coded(text: str) -> Markup:
    """Words between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _picture_uri(picture: Image.Image, side: int) -> str:
    """A data URI: PNG for small pictures, JPEG for large ones."""
    buffer = io.BytesIO()
    if max(picture.size) <= 64:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        small = picture.convert("RGB")
        small.thumbnail((side, side))
        small.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
