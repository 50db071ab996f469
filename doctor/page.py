"""The findings of `stages doctor` as aligned lines for people: page.txt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from doctor.examination import Findings


def page(findings: Findings, assumptions: Sequence[str], card_sizes: Sequence[int]) -> str:
    """At most about sixty lines."""
    environment = Environment(
        loader=PackageLoader("doctor", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"table": _table, "count": _count}
    shown = {"findings": findings, "assumptions": assumptions, "card_sizes": card_sizes}
    return environment.get_template("page.txt").render(shown).rstrip()


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
