"""Where everything that a run makes lies, below one folder; dvc.yaml names the same places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Artifacts:
    """The places under `root` (`artifacts/` in the repository).

    What does not depend on the trained heads (world, captions, frozen models, caches) lies under
    `shared` where that is given: many runs with other heads then read one set of caches.
    """

    root: Path
    shared: Path | None = None

    @property
    def common(self) -> Path:
        """Where the part lies that no trained head changes."""
        return self.root if self.shared is None else self.shared

    def stage(self, name: str) -> str:
        """How a stage that writes here is called among all that a workspace uses."""
        return name if self.shared is None else f"{self.root.as_posix()}: {name}"

    @property
    def miniature(self) -> Path:
        """The drawn miniature world, where it was asked for."""
        return self.common / "miniature"

    @property
    def captions(self) -> Path:
        """The checked caption table."""
        return self.common / "captions" / "captions.parquet"

    @property
    def documents(self) -> Path:
        """The checked documents, whose pictures are rows of the caption table."""
        return self.captions.with_name("documents.jsonl")

    @property
    def backbones(self) -> Path:
        """The manifest of the frozen models."""
        return self.common / "backbones" / "backbones.json"

    @property
    def features(self) -> Path:
        """Pooled visual vectors, one row per caption."""
        return self.common / "features.zarr"

    @property
    def targets(self) -> Path:
        """The generator's text embeddings, one row per caption."""
        return self.common / "targets.zarr"

    @property
    def latents(self) -> Path:
        """Latents of every picture, one row per caption, where the objective asks for them.

        A link of each run's own: what it leads to is shared, whether it is there is not.
        """
        return self.root / "latents.zarr"

    @property
    def replies(self) -> Path:
        """The frozen chat model's own answers to training questions."""
        return self.common / "replies" / "replies.jsonl"

    @property
    def candidates(self) -> Path:
        """The checked table of other candidates than the training pictures."""
        return self.captions.with_name("candidates.parquet")

    @property
    def candidate_features(self) -> Path:
        """Pooled visual vectors of those candidates."""
        return self.common / "candidates.zarr"

    @property
    def model(self) -> Path:
        """The trained heads and, while training, its state."""
        return self.root / "model"

    def heads(self, checkpoint: str) -> Path:
        """The trained heads of a checkpoint, `last` or `best`."""
        return self.model / f"{checkpoint}.safetensors"

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
    def findings(self) -> Path:
        """Ablations and seeds: one folder per variant, in it one per seed."""
        return self.root / "findings"

    @property
    def presets(self) -> Path:
        """Seeds of GILL under other presets: one folder per preset, with artifacts of its own."""
        return self.root / "presets"

    @property
    def report(self) -> Path:
        """The page to open."""
        return self.root / "report" / "index.html"


ARTIFACTS = Artifacts(Path("artifacts"))
METRICS = Path("metrics")
INPUTS = Path("inputs")
"""Links to the user's own files, by stage; see workfolder.inputs."""
