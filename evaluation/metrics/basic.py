"""Numbers over arrays: ranks, CLIP similarity, and what is said about their uncertainty.

Legend: B queries or pairs, N candidates, e width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gill_errors import GillError, InputError


class MetricUnavailable(GillError, RuntimeError):  # noqa: N818
    """A metric whose published weights, tables or library are not on this machine.

    Says what is missing and how to get it. Reports show it as absent, never as another metric.
    """


class MeanAndDeviation(NamedTuple):
    """A mean and the deviation around it; None where there is one value."""

    mean: float
    deviation: float | None


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


def truth_ranks(similarities: Float[Tensor, "B N"], truth: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Rank of the true candidate of each query, 0 for the best; ties are counted against it.

    A candidate as similar as the truth is ranked before it, so that a model that gives every
    candidate the same score recalls nothing.

    Args:
        truth: index of the true candidate among the N.

    Raises:
        ValueError: NaN among the similarities, or a truth outside 0 to N - 1.
    """
    count = similarities.shape[1]
    outside = (truth < 0) | (truth >= count)
    if outside.any():
        query = int(outside.nonzero()[0, 0])
        raise InputError(
            f"query {query}: the true candidate is {int(truth[query])}, "
            f"and there are {count} candidates"
        )
    undefined = similarities.isnan().any(dim=1)
    if undefined.any():
        raise InputError(f"query {int(undefined.nonzero()[0, 0])}: NaN among its similarities")
    of_truth = similarities.gather(1, truth[:, None].long())
    return (similarities >= of_truth).sum(dim=1) - 1


def cosine_similarities(
    generated: Float[Tensor, "B e"], real: Float[Tensor, "B e"]
) -> Float[Tensor, " B"]:
    """Cosine between each generated picture's CLIP embedding and its real picture's.

    "CLIP Similarity" of section 4.1. Row i of both is example i; the vectors need not be of unit
    length. At least float32.

    Raises:
        ValueError: a vector of length zero, infinite or NaN.
    """
    wide = torch.promote_types(generated.dtype, torch.float32)
    return (_unit(generated.to(wide), "generated") * _unit(real.to(wide), "real")).sum(dim=1)


def _unit(vectors: Float[Tensor, "B e"], name: str) -> Float[Tensor, "B e"]:
    lengths = vectors.norm(dim=1, keepdim=True)
    bad = ~(lengths.isfinite() & (lengths > 0)).squeeze(1)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise InputError(f"{name} embedding {row} has length {float(lengths[row])}: no direction")
    return vectors / lengths


def mean_and_deviation(values: Sequence[float] | np.ndarray | Tensor) -> MeanAndDeviation:
    """Mean over random seeds, and the sample deviation (over n - 1) between them.

    Tables 1 and 2 print "mean ± x over 5 seeds" and do not say what x is. Here it is the deviation
    between seeds, which says how far one run may be from another.

    Args:
        values: one number per seed.

    Raises:
        ValueError: no value, NaN or infinity among them.
    """
    array = _finite(values)
    return MeanAndDeviation(
        float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None
    )


def mean_and_standard_error(
    values: Sequence[float] | np.ndarray | Tensor,
) -> tuple[float, float | None]:
    """Mean over examples, and its standard error: the deviation over sqrt(n).

    Raises:
        ValueError: as `mean_and_deviation`.
    """
    mean, deviation = mean_and_deviation(values)
    return mean, None if deviation is None else float(deviation / np.sqrt(len(values)))


def bootstrap_interval(values: Sequence[float] | np.ndarray | Tensor, seed: int) -> Interval:
    """95% percentile bootstrap interval of the mean over examples, from 2000 resamples.

    Efron and Tibshirani 1993, chapter 13. For two methods on the same examples, give the
    differences per example: the interval is then of the paired difference.

    Args:
        values: one number per example.

    Raises:
        ValueError: fewer than two values, NaN or infinity among them.
    """
    array = _finite(values)
    found = scipy.stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=2000,
        # A million numbers at a time: [2000, n] of a large evaluation would not fit.
        batch=max(1, 1_000_000 // len(array)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(*map(float, found.confidence_interval))


def _finite(values: Sequence[float] | np.ndarray | Tensor) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise InputError(f"expected a list of numbers, got an array of shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise InputError(f"value {bad[0]} is {array[bad[0]]}: every value must be finite")
    return array
