"""Recall, similarity and uncertainty, each against a value found another way."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import (
    bootstrap_interval,
    cosine_similarities,
    cosine_similarity_mean,
    mean_and_deviation,
    mean_and_standard_error,
    recall_at_k,
    truth_ranks,
)


def test_recall_counts_queries_whose_truth_is_among_the_first_k() -> None:
    similarities = torch.tensor(
        [[0.9, 0.1, 0.2, 0.3], [0.9, 0.1, 0.2, 0.3], [0.9, 0.1, 0.2, 0.3], [0.9, 0.1, 0.2, 0.3]]
    )
    truth = torch.tensor([0, 3, 2, 1])  # ranks 0, 1, 2, 3
    assert truth_ranks(similarities, truth).tolist() == [0, 1, 2, 3]
    assert recall_at_k(similarities, truth, (1, 2, 3, 4)) == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}


def test_a_tie_is_counted_against_the_truth() -> None:
    similarities = torch.ones(2, 5)
    assert recall_at_k(similarities, torch.tensor([0, 4]), (1, 4, 5)) == {1: 0.0, 4: 0.0, 5: 1.0}
    similarities[:, 2] = 2.0
    similarities[:, 3] = 0.0
    # 2 is before it, 1 and 4 are as similar: three candidates are ranked before 0.
    assert truth_ranks(similarities[:1], torch.tensor([0])).tolist() == [3]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 30))
def test_recall_agrees_with_a_stable_sort_that_puts_the_truth_last(
    seed: int, queries: int, count: int
) -> None:
    generator = np.random.default_rng(seed)
    similarities = generator.integers(-3, 4, size=(queries, count)).astype(np.float32)
    truth = generator.integers(count, size=queries)
    expected = []
    for row, index in zip(similarities, truth, strict=True):
        order = sorted(range(count), key=lambda i: (-row[i], i == index))
        expected.append(order.index(index))
    k = int(generator.integers(1, count + 1))
    recall = recall_at_k(torch.from_numpy(similarities), torch.from_numpy(truth), [k])
    assert recall == {k: np.mean([rank < k for rank in expected])}


@pytest.mark.parametrize(
    ("similarities", "truth", "ks", "words"),
    [
        (torch.zeros(1, 3), torch.tensor([0]), [4], "recall@4 needs 1 <= k <= 3"),
        (torch.zeros(1, 3), torch.tensor([0]), [0], "recall@0"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), [1], "query 1: the true candidate is 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), [1], "query 1: the true candidate is -1"),
        (torch.tensor([[0.0, torch.nan]]), torch.tensor([0]), [1], "query 0: NaN"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), [1], "no query"),
    ],
)
def test_recall_refuses_what_it_cannot_mean(similarities, truth, ks, words) -> None:
    with pytest.raises(ValueError, match=words):
        recall_at_k(similarities, truth, ks)


def test_cosines_are_of_directions_not_lengths() -> None:
    generated = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    real = torch.tensor([[5.0, 0.0], [4.0, 3.0], [0.0, -1.0]])
    cosines = cosine_similarities(generated, real)
    torch.testing.assert_close(cosines, torch.tensor([1.0, 24 / 25, -1.0]))
    assert cosine_similarity_mean(generated, real) == pytest.approx((1 + 24 / 25 - 1) / 3)


def test_half_precision_embeddings_are_compared_in_float32() -> None:
    vectors = torch.full((1, 1024), 100.0, dtype=torch.float16)  # squares overflow float16
    assert cosine_similarity_mean(vectors, vectors) == pytest.approx(1.0)


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
    assert mean_and_deviation(torch.tensor(values, dtype=torch.float64)) == pytest.approx(
        (0.612, np.sqrt(2.5e-6))
    )


def test_one_value_has_no_spread() -> None:
    assert mean_and_standard_error([0.5]) == (0.5, None)
    assert mean_and_deviation([0.5]) == (0.5, None)


def test_bootstrap_interval_is_scipys() -> None:
    values = np.random.default_rng(0).exponential(size=300)
    ours = bootstrap_interval(values, seed=1, level=0.9, resamples=4000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="percentile", n_resamples=4000, rng=2
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_bootstrap_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(3, 1, 50), trial, 0.8, resamples=200)
        covered += low <= 3 <= high
    assert 0.8 - 0.09 < covered / 200 < 0.8 + 0.09  # three standard errors


def test_bootstrap_interval_is_repeatable_and_collapses_on_a_constant() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval([2.0] * 5, seed=0) == (2.0, 2.0)


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


def test_bootstrap_refuses_a_level_or_count_without_meaning() -> None:
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([1.0, 2.0], seed=0, level=95.0)
    with pytest.raises(ValueError, match="resample"):
        bootstrap_interval([1.0, 2.0], seed=0, resamples=0)
