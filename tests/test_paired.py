"""Paired intervals against scipy, and every verdict of every kind of claim."""

import numpy as np
import pytest
from scipy import stats

from evaluation.metrics.paired import (
    Difference,
    all_of,
    judge,
    mean_interval,
    paired_difference,
    seed_difference,
)


def test_with_one_seed_it_is_the_bootstrap_over_examples():
    generator = np.random.default_rng(1)
    first, second = generator.normal(0.3, 1, (1, 80)), generator.normal(0, 1, (1, 80))
    found = paired_difference(first, second)
    expected = stats.bootstrap(
        ((first - second)[0],), np.mean, n_resamples=4000, method="percentile", rng=2
    ).confidence_interval
    assert found.mean == pytest.approx((first - second).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_seeds_widen_the_interval():
    """Examples agree, seeds do not: an interval over examples alone would be a point."""
    shift = np.array([[-0.2], [-0.1], [0.0], [0.1], [0.2]])
    first = np.zeros((5, 50)) + shift + 0.05
    found = paired_difference(first, np.zeros((5, 50)))
    assert found.mean == pytest.approx(0.05)
    spread = np.sqrt((shift**2).mean() / 5)
    assert found.low == pytest.approx(0.05 - 1.96 * spread, abs=0.02)
    assert found.high == pytest.approx(0.05 + 1.96 * spread, abs=0.02)


def test_pairing_takes_out_what_both_share():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 10, (5, 40))
    noise = generator.normal(0, 0.1, (5, 40))
    found = paired_difference(hard + 0.5 + noise, hard)
    assert 0.45 < found.low < found.mean < found.high < 0.55


def test_over_seeds_it_is_students_t():
    first, second = np.array([0.9, 0.8, 0.95, 0.85, 0.7]), np.array([0.5, 0.6, 0.5, 0.4, 0.6])
    found = seed_difference(first, second)
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        ("greater", 0.01, 0.3, "seen"),
        ("greater", -0.01, 0.3, "not seen"),
        ("greater", -0.3, -0.01, "reversed"),
        ("greater", -0.04, -0.01, "not seen"),
        ("at_least", 0.01, 0.3, "seen"),
        ("at_least", -0.04, 0.3, "seen"),
        ("at_least", -0.04, -0.01, "seen"),
        ("at_least", -0.06, 0.3, "not seen"),
        ("at_least", -0.06, -0.01, "reversed"),
        ("equal", -0.04, 0.04, "seen"),
        ("equal", -0.06, 0.04, "not seen"),
        ("equal", -0.04, 0.2, "not seen"),
        ("equal", 0.06, 0.2, "reversed"),
        ("equal", -0.2, -0.06, "reversed"),
    ],
)
def test_the_verdict_follows_from_the_interval(claim, low, high, verdict):
    assert judge(claim, Difference((low + high) / 2, low, high), margin=0.05) == verdict


def test_a_finding_is_seen_when_all_of_it_is():
    assert all_of(["seen", "seen"]) == "seen"
    assert all_of(["seen", "not seen"]) == "not seen"
    assert all_of(["seen", "not seen", "reversed"]) == "reversed"
    assert all_of([]) == "not seen"


def test_wrong_tables_are_refused():
    good = np.zeros((2, 3))
    with pytest.raises(ValueError, match="finite"):
        paired_difference(good, np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="per seed"):
        seed_difference(np.zeros(1), np.zeros(1))
    with pytest.raises(ValueError, match="margin"):
        judge("greater", Difference(0.0, 0.1, -0.1), 0.05)


def test_the_interval_of_a_mean_surrounds_it():
    values = np.random.default_rng(3).uniform(0, 1, (5, 60))
    low, high = mean_interval(values)
    assert low < values.mean() < high
