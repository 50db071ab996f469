"""Differences between two models over seeds and examples, and the verdict on what was claimed.

Legend: S seeds, N examples. d[s, i] is how much better the first model did than the second, trained
with seed s, on example i.

The interval is a percentile bootstrap (Efron and Tibshirani 1993, ch. 13) in which every resample
draws S seeds and N examples with replacement and takes the mean of the drawn rows and columns: it
says what another five runs on another test set would give, as Tables 1 and 2 have it only for the
seeds. The verdicts follow from the interval alone, by a rule that was fixed before any was looked
at.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

from evaluation.metrics.uncertainty import Interval
from gill_errors import InputError

Claim = Literal["greater", "at_least", "equal"]
Verdict = Literal["seen", "not seen", "reversed"]


class Difference(NamedTuple):
    """A mean difference with its 95% interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    first: Float[np.ndarray, "S N"],
    second: Float[np.ndarray, "S N"],
    seed: int = 0,
    resamples: int = 4000,
) -> Difference:
    """Mean of first - second with the interval over seeds and examples.

    Raises:
        ValueError: other shapes than one [S, N] for both, S or N of 0, NaN or infinity.
    """
    if first.shape != second.shape or first.ndim != 2 or first.size == 0:
        raise InputError(f"expected two tables [S, N] alike, got {first.shape}, {second.shape}")
    d = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if not np.isfinite(d).all():
        raise InputError("every score must be finite")
    S, N = d.shape
    generator = np.random.default_rng(seed)
    # How often each seed and each example was drawn, instead of the draws: one product per part.
    seeds = generator.multinomial(S, np.full(S, 1 / S), size=resamples) / S
    means = np.empty(resamples)
    for start in range(0, resamples, 500):
        part = slice(start, start + 500)
        count = len(seeds[part])
        examples = generator.multinomial(N, np.full(N, 1 / N), size=count) / N
        # [draws, S] @ [S, N] -> [draws, N], then weighted by the examples of the same draw.
        means[part] = ((seeds[part] @ d) * examples).sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(d.mean()), float(low), float(high))


def seed_difference(first: Float[np.ndarray, " S"], second: Float[np.ndarray, " S"]) -> Difference:
    """Mean of first - second with Student's 95% interval over seeds, for one number per run.

    Raises:
        ValueError: fewer than 2 seeds, or other numbers of seeds in the two.
    """
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise InputError(f"expected a number per seed, got {first.shape} and {second.shape}")
    d = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    half = student.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return Difference(float(d.mean()), float(d.mean() - half), float(d.mean() + half))


def judge(claim: Claim, difference: Difference, margin: float) -> Verdict:
    """What the interval of first - second says about a claim.

    greater    first is better           seen: low > 0
    at_least   first is equal or better  seen: low > -margin
    equal      neither is better         seen: inside ±margin

    Reversed are the first two when the interval lies below 0 and reaches -margin, the last when it
    lies outside ±margin. Anything else is "not seen": the interval is too wide to tell, or nothing
    is there. A difference smaller than `margin` counts as none.

    Raises:
        ValueError: a margin below 0, an interval whose ends are in the wrong order.
    """
    _, low, high = difference
    if margin < 0 or low > high:
        raise InputError(f"no interval and margin: {difference}, {margin}")
    # Below 0, but nowhere as far as -margin: too small a difference to count.
    reverse = high < 0 and low <= -margin
    if claim == "greater":
        seen = low > 0
    elif claim == "at_least":
        seen = low > -margin
    else:
        seen = low > -margin and high < margin
        reverse = low >= margin or high <= -margin
    return "seen" if seen else "reversed" if reverse else "not seen"


def all_of(verdicts: list[Verdict]) -> Verdict:
    """Of a finding with several parts: seen when all are, reversed when one is, else not seen."""
    if verdicts and all(verdict == "seen" for verdict in verdicts):
        return "seen"
    return "reversed" if "reversed" in verdicts else "not seen"


def mean_interval(values: Float[np.ndarray, "S N"], seed: int = 0) -> Interval:
    """The interval of a mean over seeds and examples, drawn as in `paired_difference`."""
    found = paired_difference(values, np.zeros_like(values), seed, resamples=1000)
    return Interval(found.low, found.high)
