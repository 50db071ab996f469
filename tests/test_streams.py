"""Literal token lists. Words of a step: start 0, caption a = 1 2 3, caption b = 4, [IMG1] = 5."""

import pytest

from pipeline.bridge.streams import FILLED, captioning_stream, image_streams, pair_rows

V = FILLED


def test_rows_are_singles_or_neighbouring_pairs() -> None:
    assert pair_rows(5, [True, False]) == [(0, 1), (2,), (3,), (4,)]
    assert pair_rows(1, []) == [(0,)]
    with pytest.raises(ValueError, match="4 examples make 2 pairs, got 1"):
        pair_rows(4, [True])


def test_captioning_alone() -> None:
    stream = captioning_stream([3, 1], [(0,), (1,)], k=2, num_start=1, supervise_start=True)
    assert stream.source == [V, V, 0, 1, 2, V, V, 0]
    assert stream.lengths == [5, 3]
    assert stream.filled == [0, 1, 5, 6]
    assert list(zip(stream.predictors, stream.targets)) == [
        (1, 0),
        (2, 1),
        (3, 2),
        (4, 3),
        (6, 0),
        (7, 4),
    ]


def test_captioning_pair_has_one_start() -> None:
    stream = captioning_stream([3, 1], [(0, 1)], k=2, num_start=1, supervise_start=False)
    assert stream.source == [V, V, 0, 1, 2, 3, V, V]
    assert stream.lengths == [8]
    assert list(zip(stream.predictors, stream.targets)) == [(2, 1), (3, 2), (4, 3), (7, 4)]


def test_captioning_without_start_ids() -> None:
    stream = captioning_stream([2], [(0,)], k=2, num_start=0, supervise_start=True)
    assert stream.source == [V, V, 0]
    assert list(zip(stream.predictors, stream.targets)) == [(1, 0), (2, 1)]


def test_images_alone() -> None:
    streams = image_streams([3, 1], [(0,), (1,)], 2, 1, True, False)
    assert streams.prefix.source == [1, 2, 3, 4]
    assert streams.prefix.lengths == [3, 1]
    predicted = list(zip(streams.prefix.predictors, streams.prefix.targets))
    assert predicted == [(0, 1), (1, 2), (2, 3), (3, 5), (0, 4), (4, 5)]
    assert streams.suffix.source == [V] * 4
    assert streams.suffix.lengths == [2, 2]
    assert streams.suffix.targets == []


def test_images_pair_as_released_supervises_the_first_caption_only() -> None:
    streams = image_streams([3, 1], [(0, 1)], 2, 1, True, False)
    assert streams.prefix.source == [1, 2, 3]
    assert streams.suffix.source == [V, V, 4, V, V]
    assert streams.suffix.filled == [0, 1, 3, 4]
    assert streams.suffix.lengths == [5]
    assert streams.suffix.targets == []


def test_images_pair_as_in_equation_2() -> None:
    streams = image_streams([3, 1], [(0, 1)], 2, 1, False, True)
    assert list(zip(streams.prefix.predictors, streams.prefix.targets)) == [(3, 5)]
    assert list(zip(streams.suffix.predictors, streams.suffix.targets)) == [(2, 5)]


def test_images_pair_with_every_token_supervised() -> None:
    streams = image_streams([3, 1], [(0, 1)], 2, 1, True, True)
    assert list(zip(streams.suffix.predictors, streams.suffix.targets)) == [(1, 4), (2, 5)]


def test_images_without_start_ids_leave_the_first_word_unpredicted() -> None:
    streams = image_streams([2, 1], [(0,), (1,)], 1, 0, True, False)
    assert streams.prefix.source == [0, 1, 2]
    assert list(zip(streams.prefix.predictors, streams.prefix.targets)) == [(0, 1), (1, 3), (2, 3)]
