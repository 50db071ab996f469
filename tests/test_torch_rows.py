"""The cache in PyTorch's loaders: the order of ShuffledRows, each row once, gone on with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cache_samples import captions, fill_sample, make_spec, value
from torch.utils.data import DataLoader

from cache import (
    EmbeddingStore,
    ReadingParams,
    RowsUnavailableError,
    ShuffledRows,
    TorchRows,
    open_store,
)
from gill_errors import InputError

ROWS = captions(83)
PARAMS = ReadingParams(block_rows=4, buffer_rows=12)
BATCHES = 9  # of 10 rows, the last of 3


@pytest.fixture(scope="module", params=["none", "zstd"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("stores") / "s.zarr"
    fill_sample(path, ROWS, spec=make_spec(compressor=request.param))
    return open_store(path)


def dataset(store: EmbeddingStore, **options: Any) -> TorchRows:
    return store.to_torch(batch_size=10, seed=0, params=PARAMS, **options)


def expected(store: EmbeddingStore, epoch: int = 0, **options: Any) -> list[list[int]]:
    """The batches' rows as one process without a loader has them."""
    rows = ShuffledRows(
        {"pooled": (store, "pooled")}, batch_size=10, seed=0, params=PARAMS, **options
    )
    rows.load_state_dict({"epoch": epoch, "step": 0, "batch_size": 10})
    return [batch.rows.tolist() for batch in rows]


def numbers(loader: Iterable[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["row"].tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_loader_has_the_order_of_one_process(store: EmbeddingStore, workers: int) -> None:
    rows = dataset(store)
    next(iter(rows))  # its threads are this process's, and not of the forks that follow
    loader: DataLoader = DataLoader(rows, batch_size=None, num_workers=workers)
    assert len(loader) == BATCHES
    for epoch in (0, 3):
        rows.set_epoch(epoch)
        assert numbers(loader) == expected(store, epoch)
    batch = next(iter(loader))
    want = np.stack([value(ROWS[i]) for i in batch["row"]])
    torch.testing.assert_close(batch["embedding"], torch.from_numpy(want.astype(np.float16)))
    torch.testing.assert_close(batch["pooled"], torch.from_numpy(want[:, -1]), rtol=0, atol=0)


def test_workers_that_persist_are_told_of_an_epoch(store: EmbeddingStore) -> None:
    rows = dataset(store)
    loader: DataLoader = DataLoader(rows, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        assert numbers(loader) == expected(store, epoch)


def test_workers_of_several_ranks(store: EmbeddingStore) -> None:
    for rank in range(2):
        where = {"rank": rank, "world_size": 2}
        loader: DataLoader = DataLoader(dataset(store, **where), batch_size=None, num_workers=2)
        assert numbers(loader) == expected(store, **where)


def test_workers_that_are_no_forks(store: EmbeddingStore) -> None:
    loader: DataLoader = DataLoader(
        dataset(store), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    assert numbers(loader) == expected(store)


def test_a_pass_begins_anew_unless_a_state_was_loaded(store: EmbeddingStore) -> None:
    rows = dataset(store)
    passing = iter(rows)
    for _ in range(4):
        next(passing)
    state = rows.state_dict()
    assert state == {"epoch": 0, "step": 4, "batch_size": 10}
    assert numbers(rows) == expected(store)
    rows.load_state_dict(state)
    assert rows.state_dict() == state
    assert numbers(rows) == expected(store)[4:]
    assert numbers(rows) == expected(store)
    with pytest.raises(InputError, match="batches of 7 rows"):
        rows.load_state_dict({**state, "batch_size": 7})


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_stateful_loader_goes_on_where_it_was(store: EmbeddingStore, workers: int) -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    whole = expected(store, 2)
    for cut in (1, 4, 7, 8):
        rows = dataset(store)
        rows.set_epoch(2)
        loader = loaders.StatefulDataLoader(rows, batch_size=None, num_workers=workers)
        first = iter(loader)
        before = [next(first)["row"].tolist() for _ in range(cut)]
        state = loader.state_dict()
        del first
        again = loaders.StatefulDataLoader(dataset(store), batch_size=None, num_workers=workers)
        again.load_state_dict(state)
        assert before + numbers(again) == whole


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs/howto/own-loop.md").read_text(encoding="utf-8")
    (example,) = [block for block in page.split("```python\n") if "to_torch" in block]
    fill_sample(tmp_path / "artifacts/targets.zarr", captions(450))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.split("```")[0], names)
    assert len(names["loader"]) == 3
    assert names["batch"]["embedding"].shape == (50, 5, 6)


def test_what_is_wrong_with_a_store_shows_before_any_worker(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, captions(9))
    store = open_store(path, writable=True)
    store.mark_pending(np.array([4]))
    with pytest.raises(RowsUnavailableError, match="1 rows are pending"):
        store.to_torch(batch_size=4, seed=0)
    with pytest.raises(KeyError, match="no array 'nothing'"):
        TorchRows({"x": (path, "nothing")}, batch_size=4, seed=0)
