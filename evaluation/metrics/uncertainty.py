"""What is said about the uncertainty of numbers. Without torch, which the report does not need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from gill_errors import InputError


class MeanAndDeviation(NamedTuple):
    """A mean and the deviation around it; None where there is one value."""

    mean: float
    deviation: float | None


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


def mean_and_deviation(values: Sequence[float] | np.ndarray) -> MeanAndDeviation:
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
    values: Sequence[float] | np.ndarray,
) -> tuple[float, float | None]:
    """Mean over examples, and its standard error: the deviation over sqrt(n).

    Raises:
        ValueError: as `mean_and_deviation`.
    """
    mean, deviation = mean_and_deviation(values)
    return mean, None if deviation is None else float(deviation / np.sqrt(len(values)))


def bootstrap_interval(values: Sequence[float] | np.ndarray, seed: int) -> Interval:
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


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise InputError(f"expected a list of numbers, got an array of shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise InputError(f"value {bad[0]} is {array[bad[0]]}: every value must be finite")
    return array
