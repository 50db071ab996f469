"""Where everything that a run makes lies, below one folder; dvc.yaml names the same places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Artifacts:
    """The places under `root` (`artifacts/` in the repository)."""

    root: Path

    @property
    def miniature(self) -> Path:
        """The drawn miniature world, where it was asked for."""
        return self.root / "miniature"

    @property
    def captions(self) -> Path:
        """The checked caption table."""
        return self.root / "captions" / "captions.parquet"

    @property
    def backbones(self) -> Path:
        """The manifest of the frozen models."""
        return self.root / "backbones" / "backbones.json"

    @property
    def features(self) -> Path:
        """Pooled visual vectors, one row per caption."""
        return self.root / "features.zarr"

    @property
    def targets(self) -> Path:
        """The generator's text embeddings, one row per caption."""
        return self.root / "targets.zarr"

    @property
    def model(self) -> Path:
        """The trained heads and, while training, its state."""
        return self.root / "model"

    @property
    def index(self) -> Path:
        """The candidate index."""
        return self.root / "index"

    @property
    def decision(self) -> Path:
        """The retrieve-or-generate classifier."""
        return self.root / "decision"

    @property
    def evaluation(self) -> Path:
        """Tables, records and pictures of the evaluation."""
        return self.root / "evaluation"

    @property
    def report(self) -> Path:
        """The page to open."""
        return self.root / "report" / "index.html"
