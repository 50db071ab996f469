"""Batches from the cache: their order, their values, and going on in the middle of an epoch."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_language_models import tiny_tokenizer

from cache import ArraySpec, ReadingParams, Roles, ShuffledRows, StoreSpec, fill
from stages.cached_batches import BatchMaker, CachedBatches

ROWS, BATCH = 23, 4
READING = ReadingParams(block_rows=3, buffer_rows=6)


class Captions:
    """A caption table whose caption of row i says which row it is."""

    def captions(self, rows):
        return [f"w{row} a" for row in rows]


def value(row, *shape):
    return np.full(shape, row / 8, np.float16)


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    stores = {"features": ("pooled", {"visual": 3}), "targets": ("embedding", {"l": 2, "c": 4})}
    for store, (name, dims) in stores.items():

        def encode(rows, name=name, dims=dims):
            return {name: np.stack([value(row, *dims.values()) for row in rows])}

        fill(
            folder / f"{store}.zarr",
            list(range(ROWS)),
            StoreSpec(arrays={name: ArraySpec(dims=dims)}, shard_rows=8),
            lambda encode=encode: Roles(read=int, encode=encode),
            provenance={"model": "numbers"},
        )
    model = SimpleNamespace(device=torch.device("cpu"), tokenizer=tiny_tokenizer())
    artifacts = SimpleNamespace(features=folder / "features.zarr", targets=folder / "targets.zarr")
    return BatchMaker(Captions(), model, 5, artifacts=artifacts)


def batches(maker, **given):
    options = {"batch_size": BATCH, "seed": 3, "rank": 0, "world_size": 1, "reading": READING}
    return CachedBatches(maker, np.arange(ROWS), **{**options, **given})


def rows_of(found):
    return [batch.rows.tolist() for batch in found]


def test_a_batch_holds_its_rows_in_float32_with_their_captions(maker):
    tokenizer = tiny_tokenizer()
    for batch in islice(iter(batches(maker)), 7):
        rows = batch.rows.tolist()
        wanted = torch.tensor(rows, dtype=torch.float32) / 8
        torch.testing.assert_close(batch.pooled, wanted[:, None].expand(-1, 3))
        torch.testing.assert_close(batch.targets, wanted[:, None, None].expand(-1, 2, 4))
        words = tokenizer([f"w{row} a" for row in rows], add_special_tokens=False)["input_ids"]
        assert batch.tokens.tolist() == [i for ids in words for i in ids]
        assert batch.lengths == [2] * BATCH


def test_the_order_is_that_of_the_shuffled_rows_over_several_epochs(maker):
    reader = ShuffledRows(maker.sources, batch_size=BATCH, seed=3, drop_last=True, params=READING)
    expected = [batch.rows.tolist() for _ in range(3) for batch in reader]
    assert rows_of(islice(iter(batches(maker)), len(expected))) == expected
    assert len({str(rows) for rows in expected}) == len(expected)


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 7])
def test_the_position_is_that_of_the_batch_handed_out_whatever_was_made_ahead(maker, taken):
    expected = rows_of(islice(iter(batches(maker)), 14))
    source = batches(maker)
    iterator = iter(source)
    before = rows_of(islice(iterator, taken))
    position = source.state_dict()
    resumed = batches(maker)
    resumed.load_state_dict(position)
    assert before + rows_of(islice(iter(resumed), 14 - taken)) == expected


def test_a_second_iteration_goes_on_after_the_last_batch_handed_out(maker):
    expected = rows_of(islice(iter(batches(maker)), 8))
    source = batches(maker)
    iterator = iter(source)
    first = rows_of(islice(iterator, 3))
    iterator.close()
    assert first + rows_of(islice(iter(source), 5)) == expected


def test_what_goes_wrong_while_a_batch_is_made_ahead_is_raised(maker, monkeypatch):
    source = batches(maker)
    iterator = iter(source)
    next(iterator)

    def broken(rows, arrays):
        raise RuntimeError("no such caption")

    monkeypatch.setattr(maker, "make", broken)
    with pytest.raises(RuntimeError, match="no such caption"):
        list(islice(iterator, 3))
