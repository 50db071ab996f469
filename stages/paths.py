"""Where the stages read and write, relative to the repository root."""

from pathlib import Path

from app.artifacts import Artifacts

ARTIFACTS = Artifacts(Path("artifacts"))
METRICS = Path("metrics")
