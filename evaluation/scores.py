"""Scores of generated pictures beside the real ones, and how a list of scores becomes a result.

CLIP similarity (the run's own visual encoder, in its joint space; section 4.1), LPIPS and FID where
their published weights are named (`evaluation.metrics.images` states the conventions), and on the
miniature world the oracle's share of right attributes and of wholly right pictures. Pictures are
opened a batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from corpora.pictures import open_picture
from evaluation.metrics.basic import MetricUnavailable, cosine_similarities
from evaluation.metrics.images import (
    InceptionFeatures,
    LearnedPerceptualDistance,
    frechet_distance,
)
from evaluation.metrics.uncertainty import bootstrap_interval, mean_and_standard_error
from evaluation.progress import BATCH, Meter, in_batches
from evaluation.results import Result
from evaluation.sets import EvaluationSet
from miniature import oracle
from pipeline.frozen.visual_encoder import VisualEncoder
from settings.evaluation import EvaluationParams

T = TypeVar("T")


@dataclass
class Found:
    """What one method's pictures of one set are worth."""

    values: dict[str, list[float]] = field(default_factory=dict)
    """Metric to one number per example."""
    whole: dict[str, float] = field(default_factory=dict)
    """Metric to a number of the whole set."""
    absent: dict[str, str] = field(default_factory=dict)
    """Metric to why there is none."""


class PictureScorer:
    """Loads the networks of LPIPS and FID when they are first needed; says why one is absent."""

    def __init__(self, encoder: VisualEncoder, section: EvaluationParams) -> None:
        self._encoder = encoder
        self._real: dict[str, Tensor] = {}
        device = encoder.device
        self._lpips = _loaded(LearnedPerceptualDistance, section.lpips_weights, device)
        self._inception = _loaded(InceptionFeatures, section.inception_weights, device)

    def score(self, one: EvaluationSet, pictures: Mapping[str, Sequence[Path]]) -> dict[str, Found]:
        """What each method's pictures are worth."""
        found = {method: Found() for method in pictures}
        features: dict[str, list[Tensor]] = {}
        total = len(one.examples)
        with Meter(f"{one.title}, scores", total, "examples") as meter:
            for first in range(0, total, BATCH):
                part = slice(first, first + BATCH)
                self._score_batch(one, pictures, part, found, features)
                meter.add(len(one.examples[part]))
        for method, scores in found.items():
            self._finish(scores, features.get(method), features.get("real"))
        return found

    def _score_batch(
        self,
        one: EvaluationSet,
        pictures: Mapping[str, Sequence[Path]],
        part: slice,
        found: Mapping[str, Found],
        features: dict[str, list[Tensor]],
    ) -> None:
        examples = one.examples[part]
        references = [example.real for example in examples]
        real: list[Image.Image] = []
        if self._needs_real or any(name not in self._real for name in references):
            real = [open_picture(name) for name in references]
            self._real |= zip(references, self._joint(real), strict=True)
        if isinstance(self._inception, InceptionFeatures):
            features.setdefault("real", []).append(self._inception.encode(real))
        embedded = torch.stack([self._real[name] for name in references])
        scenes = [example.scene for example in examples]
        for method, paths in pictures.items():
            made = [open_picture(path) for path in paths[part]]
            values = found[method].values
            similarity = cosine_similarities(self._joint(made), embedded)
            values.setdefault("clip_similarity", []).extend(similarity.tolist())
            if isinstance(self._lpips, LearnedPerceptualDistance):
                distances = self._lpips.distances(made, real)
                values.setdefault("lpips", []).extend(distances.tolist())
            if isinstance(self._inception, InceptionFeatures):
                features.setdefault(method, []).append(self._inception.encode(made))
            if all(scene is not None for scene in scenes):
                truth = np.array([scene.codes for scene in scenes if scene is not None])
                right = oracle.read_scenes(made) == truth
                values.setdefault("oracle_attributes", []).extend(right.mean(1).tolist())
                values.setdefault("oracle_exact", []).extend(right.all(1).astype(float).tolist())

    def _finish(self, scores: Found, made: list[Tensor] | None, real: list[Tensor] | None) -> None:
        if isinstance(self._lpips, str):
            scores.absent["lpips"] = self._lpips
        if isinstance(self._inception, str):
            scores.absent["fid"] = self._inception
        elif made is not None and real is not None:
            try:
                scores.whole["fid"] = frechet_distance(torch.cat(made), torch.cat(real))
            except ValueError as error:
                scores.absent["fid"] = str(error)

    @property
    def _needs_real(self) -> bool:
        """Whether a metric needs the real picture itself, and not only its CLIP vector."""
        return not isinstance(self._lpips, str) or not isinstance(self._inception, str)

    def _joint(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "N c"]:
        """Vectors in CLIP's joint space, on the CPU."""
        return self._encoder.project(self._encoder.encode_pictures(pictures)).cpu()


def pooled_of(encoder: VisualEncoder, references: Sequence[str], what: str) -> Float[Tensor, "N d"]:
    """v_phi of pictures by reference, float32 on the CPU, a batch at a time."""

    def pooled(batch: Sequence[str]) -> Tensor:
        return encoder.encode_pictures([open_picture(reference) for reference in batch])

    return in_batches(pooled, references, what)


@dataclass(frozen=True)
class Rows:
    """Makes results of one set; the table and the published number are added where it is used."""

    set: str
    title: str
    examples: int
    of: int
    seed: int

    def results(self, method: str, found: Found) -> list[Result]:
        """One result per metric."""
        rows = [self.mean(method, metric, values) for metric, values in found.values.items()]
        rows += [self.whole(method, metric, value) for metric, value in found.whole.items()]
        return rows + [self.absent(method, metric, why) for metric, why in found.absent.items()]

    def mean(self, method: str, metric: str, values: Sequence[float]) -> Result:
        """A mean over examples, with its standard error and bootstrap interval."""
        mean, error = mean_and_standard_error(values)
        low, high = bootstrap_interval(values, self.seed) if len(values) > 1 else (None, None)
        return replace(self.whole(method, metric, mean), standard_error=error, low=low, high=high)

    def whole(self, method: str, metric: str, value: float | None) -> Result:
        """A number of the whole set, which no example has of its own."""
        return Result(
            "", self.set, self.title, method, metric, value, None, None, None,
            self.examples, self.of,
        )  # fmt: skip

    def absent(self, method: str, metric: str, why: str) -> Result:
        """A number that there is not, and why."""
        return replace(self.whole(method, metric, None), absent=why)


def _loaded(
    network: Callable[[Path | None, torch.device], T], weights: str | None, device: torch.device
) -> T | str:
    """A metric's network, or why there is none."""
    try:
        return network(None if weights is None else Path(weights), device)
    except MetricUnavailable as error:
        return str(error)
