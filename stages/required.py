"""What an earlier stage has made: its place, or which stage to run."""

from __future__ import annotations

from pathlib import Path

from gill_errors import StageError


def required(path: Path, stage: str) -> Path:
    """The path itself. Raises StageError naming the stage that makes it, where it is not there."""
    if not path.exists():
        raise StageError(f"{path} is missing: run `stages {stage}`")
    return path
