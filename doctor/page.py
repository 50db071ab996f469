"""The findings of `stages doctor` as aligned lines for people: page.txt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from doctor.throughput import ANSWERING_SHARE, ENCODING_SHARE, TRAINING_SHARE
from doctor.training import CAPTION_TOKENS

if TYPE_CHECKING:
    from doctor.examination import Findings


def page(findings: Findings) -> str:
    """At most about sixty lines."""
    environment = Environment(
        loader=PackageLoader("doctor", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"table": _table, "count": _count}
    environment.globals |= {
        "CARD_SIZES": (8, 12, 16, 24, 48, 80),
        "CAPTION_TOKENS": CAPTION_TOKENS,
        "ANSWERING_SHARE": ANSWERING_SHARE,
        "ENCODING_SHARE": ENCODING_SHARE,
        "TRAINING_SHARE": TRAINING_SHARE,
    }
    return environment.get_template("page.txt").render(findings=findings).rstrip()


def _table(text: str, *numbers: int) -> str:
    """Columns between `|` two spaces apart, `numbers` to the right; the first line is the heading.

    Rows are two spaces further to the right than their heading.
    """
    rows = [[cell.strip() for cell in line.split(" |")] for line in text.splitlines()]
    rows[1:] = [[f"  {first}", *others] for first, *others in rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in numbers else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
