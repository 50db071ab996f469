"""The findings of `stages doctor` as aligned lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from doctor.examination import Findings


def page(findings: Findings, assumptions: Sequence[str], card_sizes: Sequence[int]) -> str:
    """At most about sixty lines."""
    sections = [
        [f"stages doctor: {findings.params}"],
        _libraries(findings),
        _machine(findings),
        _models(findings),
        _dimensions(findings),
        _stages(findings),
        _variants(findings, card_sizes),
        ["assumptions", *(f"  {line}" for line in assumptions)],
        _verdict(findings),
    ]
    return "\n".join(line for section in sections for line in section)


def _libraries(findings: Findings) -> list[str]:
    cells = [
        f"{lib.name} {lib.installed or 'MISSING'}" + ("" if lib.fits else f" (wants {lib.wanted})")
        for lib in findings.libraries
    ]
    width = max(map(len, cells)) + 2
    rows = [
        "".join(cell.ljust(width) for cell in cells[i : i + 4]) for i in range(0, len(cells), 4)
    ]
    return ["versions", *(f"  {row.rstrip()}" for row in rows)]


def _machine(findings: Findings) -> list[str]:
    machine = findings.machine
    lines = [f"  {card}" for card in machine.cards] or ["  no GPU here"]
    if machine.card is not None and not machine.card_is_here:
        lines.append(f"  thought of: {machine.card.name}, {machine.card.memory / 1e9:.1f} GB")
    lines.append(
        f"  {machine.cores} CPU cores, {_gigabytes(machine.memory)} of memory, "
        f"{_gigabytes(machine.free_disk)} free where {machine.disk_of} lies"
    )
    return ["machine", *lines]


def _models(findings: Findings) -> list[str]:
    rows = [("frozen model", "source", "parameters", "computes in", "where from")]
    for line in findings.models.lines:
        parameters = "unknown" if line.parameters is None else _count(line.parameters)
        kind = "" if line.quantization == "none" else f" {line.quantization}"
        where = line.says
        if line.download:
            revision = line.revision or "not pinned"
            where = f"download {line.download:.1f} GB, revision {revision}"
        rows.append((line.role, line.source, parameters, line.dtype + kind, where))
    return _table(rows, numbers=(2,))


def _dimensions(findings: Findings) -> list[str]:
    sizes = findings.models.sizes
    if sizes is None:
        return ["dimensions: unknown until every model above is resolved"]
    pairs = {name: getattr(sizes, name) for name in ("d", "e", "k", "r", "L", "D", "m", "p")}
    if sizes.D_pooled is not None:
        pairs["D_pooled"] = sizes.D_pooled
    text = "  ".join(f"{name} {value}" for name, value in pairs.items())
    trained = findings.models.trained
    return [
        f"dimensions  {text}",
        "trained     "
        + ("cannot be built" if trained is None else f"{_count(trained)} parameters"),
    ]


def _stages(findings: Findings) -> list[str]:
    rows = [("stage", "rows", "GB written", "GB on the GPU", "GB in memory", "hours", "")]
    for cost in findings.stages:
        rows.append(
            (
                cost.name,
                f"{cost.rows:,}",
                f"{cost.written / 1e9:.2f}",
                "-" if cost.device_memory is None else f"{cost.device_memory / 1e9:.1f}",
                f"{cost.host_memory / 1e9:.1f}",
                "-" if cost.hours is None else _hours(cost.hours),
                cost.note,
            )
        )
    source = f"rows: {findings.rows.number:,} ({findings.rows.known_from})"
    return [*_table(rows, numbers=(1, 2, 3, 4, 5)), f"  {source}"]


def _variants(findings: Findings, card_sizes: Sequence[int]) -> list[str]:
    if not findings.variants:
        return []
    rows = [("training on one GPU", "GB", "fits a card of")]
    for variant in findings.variants:
        needed = variant.device_memory / 1e9
        fits = [size for size in card_sizes if size >= needed]
        size = f"{fits[0]} GB" if fits else f"more than {card_sizes[-1]} GB"
        rows.append((variant.says, f"{needed:.1f}", size))
    return _table(rows, numbers=(1,))


def _verdict(findings: Findings) -> list[str]:
    lines = [f"  CANNOT RUN: {problem}" for problem in findings.problems]
    lines += [f"  note: {warning}" for warning in findings.warnings]
    return ["verdict", *(lines if findings.problems else [*lines, "  everything fits"])]


def _table(rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    """Columns two spaces apart, numbers to the right; the first line is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for place, row in enumerate(rows):
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append(("  " if place else "") + "  ".join(cells).rstrip())
    lines[0] = "  ".join(
        cell.rjust(width) if i in numbers else cell.ljust(width + (2 if i == 0 else 0))
        for i, (cell, width) in enumerate(zip(rows[0], widths))
    ).rstrip()
    return lines


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"
