"""Reads which modules of the project a module imports, from its source, lazy imports included."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = (
    *("gill", "settings", "pipeline", "cache", "cluster", "corpora", "workfolder", "evaluation"),
    *("doctor", "miniature", "app", "stages", "benchmarks"),
)


def modules() -> list[Path]:
    """Every Python file of the rooms, relative to the root."""
    found = (f for room in ROOMS for f in (ROOT / room).rglob("*.py"))
    return sorted(f.relative_to(ROOT) for f in found)


def imported_names(module: Path) -> set[str]:
    """Dotted names that a file imports, `from a import b` giving both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide rooms"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names
