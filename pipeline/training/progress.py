"""What a training run says while it goes: a line for people, a curve on disk, rates and the ETA."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.checkpoint import CurvePoint
from pipeline.bridge.mixed_batch import MixedBatch
from pipeline.settings import TrainingSettings
from pipeline.training.distribution import num_processes


@dataclass(frozen=True)
class TrainingProgress:
    """How training goes, for people."""

    step: int
    steps: int
    losses: dict[str, float]
    examples_per_second: float
    """Over all processes, as the next one."""
    tokens_per_second: float
    """Caption tokens."""
    waiting: float
    """Share of the time spent waiting for data, 0 to 1."""
    seconds_left: float

    def __str__(self) -> str:
        parts = " ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
        hours, seconds = divmod(round(self.seconds_left), 3600)
        return (
            f"step {self.step}/{self.steps}  {parts}  {self.examples_per_second:.0f} examples/s  "
            f"{self.tokens_per_second:.0f} tokens/s  data wait {self.waiting:.0%}  "
            f"ETA {hours}:{seconds // 60:02d}:{seconds % 60:02d}"
        )


def show_progress(progress: TrainingProgress) -> None:
    """Print one line to standard error."""
    print(progress, file=sys.stderr, flush=True)


class DvcliveLog:
    """Writes the curve with dvclive: `metrics.json` and `plots/metrics/**.tsv` in `directory`.

    The project's dvc.yaml and experiments are left alone, and no git repository is needed. What
    dvclive wrote there before is replaced: a resumed run logs its whole curve again.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = directory
        self._live: Any = None

    def __call__(self, row: CurvePoint) -> None:
        """Log a point of the curve."""
        if self._live is None:  # with the first row, which only one of several processes gets
            from dvclive import Live

            class Curve(Live):  # type: ignore[misc]
                def _init_dvc(self) -> None:
                    """Look for no repository: one without a commit is an error to dvclive."""

            self._live = Curve(dir=str(self._directory), dvcyaml=False, save_dvc_exp=False)
        self._live.step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self._live.log_metric(name, value)
        self._live.make_summary()

    def show(self, picture: Image.Image, step: int) -> None:
        """The grid of validation pictures of a step, once the curve has begun."""
        if self._live is not None:
            self._live.log_image(f"pictures/{step:06d}.png", picture)

    def __enter__(self) -> DvcliveLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.end()


class Clock:
    """Rates and remaining time since this process began."""

    def __init__(self, settings: TrainingSettings, first_step: int) -> None:
        self._settings, self._first_step = settings, first_step
        self._start = time.perf_counter()
        self._waited = 0.0
        self._examples = self._tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def count(self, batch: CaptionBatch | MixedBatch) -> None:
        """Count a batch, of all processes."""
        self._examples += len(batch) * num_processes()
        self._tokens += batch.num_tokens * num_processes()

    def progress(self, step: int, report: Mapping[str, float]) -> TrainingProgress:
        """Where training is, how fast it goes, and when it ends."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        steps = self._settings.steps
        return TrainingProgress(
            step=step,
            steps=steps,
            losses={k: v for k, v in report.items() if k not in ("gradient_norm", "learning_rate")},
            examples_per_second=self._examples / elapsed,
            tokens_per_second=self._tokens / elapsed,
            waiting=self._waited / elapsed,
            seconds_left=elapsed / (step - self._first_step) * (steps - step),
        )
