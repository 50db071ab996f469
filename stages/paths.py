"""Where the stages read and write, relative to the repository root."""

from pathlib import Path

from app.artifacts import Artifacts

ARTIFACTS = Artifacts(Path("artifacts"))
METRICS = Path("metrics")
INPUTS = Path("inputs")
"""Links to the user's own files, by stage; see workfolder.inputs."""
