"""What an earlier stage has made: its place, or which stage to run; and where it makes nothing."""

from __future__ import annotations

from pathlib import Path

from gill_errors import StageError


def required(path: Path, stage: str) -> Path:
    """The path itself. Raises StageError naming the stage that makes it, where it is not there."""
    if not path.exists():
        raise StageError(f"{path} is missing: run `stages {stage}`")
    return path


def write_without_content(path: Path) -> None:
    """Write an output of which nothing is asked: an empty line, as DVC warns of empty files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n", encoding="utf-8")
