"""Reads which modules of the project a module imports, from its source, lazy imports included."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES_INIT = Path("stages/__init__.py")
ROOMS = ("pipeline", "stages", "cache", "corpora", "miniature", "app", "benchmarks")


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


def project_imports(module: Path) -> set[Path]:
    """Files of the project that a file imports directly."""
    files: set[Path] = set()
    for name in imported_names(module):
        path = Path(*name.split("."))
        room = path.parts[0] if path.parts else ""
        candidates = [path.with_suffix(".py"), Path(room) / "__init__.py"]
        # `stages/__init__.py` is the command line, which reaches every stage and computes nothing.
        if room in ROOMS:
            files.update(f for f in candidates if (ROOT / f).is_file() and f != STAGES_INIT)
    return files


def closure(module: Path) -> set[Path]:
    """A file with every file of the project that it reaches; empty package files are left out."""
    seen: set[Path] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo.extend(project_imports(current))
    return {f for f in seen if (ROOT / f).read_text(encoding="utf-8").strip()}
