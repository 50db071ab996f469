"""Ranks, similarity and uncertainty, each against a value found another way."""

import tracemalloc

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics.basic import cosine_similarities, truth_ranks
from evaluation.metrics.uncertainty import (
    bootstrap_interval,
    mean_and_deviation,
    mean_and_standard_error,
)


def test_a_rank_counts_the_candidates_before_the_truth() -> None:
    similarities = torch.tensor([[0.9, 0.1, 0.2, 0.3]] * 4)
    assert truth_ranks(similarities, torch.tensor([0, 3, 2, 1])).tolist() == [0, 1, 2, 3]


def test_a_tie_is_counted_against_the_truth() -> None:
    similarities = torch.ones(2, 5)
    assert truth_ranks(similarities, torch.tensor([0, 4])).tolist() == [4, 4]
    similarities[:, 2] = 2.0
    similarities[:, 3] = 0.0
    # 2 is before it, 1 and 4 are as similar: three candidates are ranked before 0.
    assert truth_ranks(similarities[:1], torch.tensor([0])).tolist() == [3]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 30))
def test_ranks_are_those_of_scipy_with_ties_last(seed: int, queries: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    similarities = generator.integers(-3, 4, size=(queries, count)).astype(np.float32)
    truth = generator.integers(count, size=queries)
    # Of equal ones each has the last of their ranks, counted from 1.
    expected = scipy.stats.rankdata(-similarities, method="max", axis=1) - 1
    ranks = truth_ranks(torch.from_numpy(similarities), torch.from_numpy(truth))
    assert ranks.tolist() == expected[np.arange(queries), truth].tolist()


@pytest.mark.parametrize(
    ("similarities", "truth", "words"),
    [
        (
            torch.zeros(2, 3),
            torch.tensor([0, 3]),
            "query 1: the true candidate is 3, .* are 3 cand",
        ),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "query 1: the true candidate is -1"),
        (torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), torch.tensor([0, 0]), "query 1: NaN"),
    ],
)
def test_ranks_that_mean_nothing_are_refused(similarities, truth, words) -> None:
    with pytest.raises(ValueError, match=words):
        truth_ranks(similarities, truth)


def test_cosines_are_of_directions_not_lengths() -> None:
    generated = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    real = torch.tensor([[5.0, 0.0], [4.0, 3.0], [0.0, -1.0]])
    cosines = cosine_similarities(generated, real)
    torch.testing.assert_close(cosines, torch.tensor([1.0, 24 / 25, -1.0]))


def test_half_precision_embeddings_are_compared_in_float32() -> None:
    vectors = torch.full((1, 1024), 100.0, dtype=torch.float16)  # squares overflow float16
    cosines = cosine_similarities(vectors, vectors)
    assert cosines.dtype == torch.float32
    torch.testing.assert_close(cosines, torch.ones(1))


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_vector_without_direction_is_refused(bad: float) -> None:
    vectors = torch.ones(2, 3)
    broken = torch.stack([torch.ones(3), torch.full((3,), bad)])
    with pytest.raises(ValueError, match="real embedding 1"):
        cosine_similarities(vectors, broken)


def test_standard_error_and_deviation_divide_by_one_less() -> None:
    values = [0.612, 0.613, 0.611, 0.614, 0.610]
    mean, error = mean_and_standard_error(values)
    assert mean == pytest.approx(0.612)
    assert error == pytest.approx(scipy.stats.sem(values))
    assert mean_and_deviation(values) == pytest.approx((0.612, np.sqrt(2.5e-6)))


def test_two_values_have_a_spread() -> None:
    assert mean_and_standard_error([1.0, 3.0]) == pytest.approx((2, 1))
    assert mean_and_deviation([1.0, 3.0]) == pytest.approx((2, np.sqrt(2)))


def test_one_value_has_no_spread() -> None:
    assert mean_and_standard_error([0.5]) == (0.5, None)
    assert mean_and_deviation([0.5]) == (0.5, None)


def test_bootstrap_interval_of_shares_is_the_binomials() -> None:
    # A resample of 120 ones and 280 zeros has Binomial(400, 0.3) ones: no draw is needed to know.
    low, high = bootstrap_interval([1.0] * 120 + [0.0] * 280, seed=0)
    exact = scipy.stats.binom.ppf([0.025, 0.975], 400, 0.3) / 400
    assert [low, high] == pytest.approx(exact.tolist(), abs=2 / 400)


def test_bootstrap_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(3, 1, 50), trial)
        covered += low <= 3 <= high
    assert 0.95 - 0.05 < covered / 200 < 0.95 + 0.05  # three standard errors


def test_bootstrap_interval_is_repeatable_and_collapses_on_a_constant() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval([2.0] * 5, seed=0) == (2.0, 2.0)


def test_bootstrap_interval_of_many_examples_stays_in_memory() -> None:
    values = np.random.default_rng(0).normal(size=20_000)
    tracemalloc.start()
    try:
        bootstrap_interval(values, seed=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100e6  # all resamples at once: 640 MB


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "shape"),
        ([1.0, np.nan], "value 1 is nan"),
        (np.ones((2, 2)), "shape"),
        ([np.inf], "value 0"),
    ],
)
def test_statistics_refuse_missing_and_unfinished_values(values, words: str) -> None:
    for statistic in (mean_and_standard_error, mean_and_deviation):
        with pytest.raises(ValueError, match=words):
            statistic(values)
    with pytest.raises(ValueError, match=words):
        bootstrap_interval(values, seed=0)
