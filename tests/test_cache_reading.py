"""Reading: right rows, right order, every row once, resumable, and damage that is noticed."""

from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_samples import captions, encode, fill_sample, make_spec, value

from cache import (
    DamagedRowsError,
    EmbeddingStore,
    ReadingParams,
    RowsUnavailableError,
    ShuffledRows,
    StoresDifferError,
    iterate_blocks,
    layout,
    open_store,
    read_rows,
    shards,
)
from cache.memory import Memory
from gill_errors import InputError

Stores = tuple[Path | EmbeddingStore, ...]

COUNT = 83
FAILED = [9, 40, 41]
PARAMS = ReadingParams(block_rows=4, buffer_rows=12)


@pytest.fixture(scope="module")
def rows() -> list[str]:
    rows = captions(COUNT)
    for i in FAILED:
        rows[i] = f"unreadable {i}"
    return rows


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> Stores:
    """Stores with the same rows: float16; int8, compressed, in other shards; int8, uncompressed."""
    folder = tmp_path_factory.mktemp("stores")
    one, two, three = folder / "one.zarr", folder / "two.zarr", folder / "three.zarr"
    fill_sample(one, rows)
    spec = make_spec(shard_rows=20, dtype="int8", share_first=True, compressor="blosc-zstd")
    fill_sample(two, rows, spec=spec)
    fill_sample(three, rows, spec=make_spec(dtype="int8", share_first=True))
    return one, two, three


@cache
def opened(stores: Stores) -> Stores:
    return tuple(map(open_store, stores))


def shuffled(stores: Stores, **options: object) -> ShuffledRows:
    defaults = {"batch_size": 10, "seed": 0, "params": PARAMS}
    sources = {
        "embedding": (stores[0], "embedding"),
        "coarse": (stores[1], "embedding"),
        "coarse, uncompressed": (stores[2], "embedding"),
        "pooled": (stores[1], "pooled"),
    }
    return ShuffledRows(sources, **{**defaults, **options})  # type: ignore[arg-type]


def at(epoch: int, step: int, batch_size: int = 10) -> dict[str, int]:
    return {"epoch": epoch, "step": step, "batch_size": batch_size}


def pooled(stores: Stores, **options: object) -> ShuffledRows:
    return ShuffledRows({"pooled": (opened(stores)[0], "pooled")}, **options)  # type: ignore[arg-type]


def test_batches_join_the_stores_row_by_row(stores: Stores, rows: list[str]) -> None:
    reader = shuffled(stores)
    seen = []
    for batch in reader:
        want = np.stack([value(rows[i]) for i in batch.rows])
        assert batch.rows.dtype == np.int64
        np.testing.assert_array_equal(batch.arrays["embedding"], want.astype(np.float16))
        np.testing.assert_array_equal(batch.arrays["pooled"], want[:, -1])
        np.testing.assert_array_equal(batch.arrays["coarse"][:, 0], want[:, 0])
        assert np.abs(batch.arrays["coarse"] - want).max() < 0.05
        np.testing.assert_array_equal(batch.arrays["coarse, uncompressed"], batch.arrays["coarse"])
        seen.append(batch.rows)
    assert [len(rows) for rows in seen] == [10] * 8
    assert sorted(np.concatenate(seen)) == sorted(set(range(COUNT)) - set(FAILED))
    assert (reader.num_rows, reader.num_failed) == (80, 3)
    assert reader.state_dict() == at(1, 0)


@given(
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 30),
    block_rows=st.integers(1, 20),
    buffer_rows=st.integers(1, 60),
    drop=st.sets(st.integers(0, COUNT - 1)),
)
@settings(max_examples=60, deadline=None)
def test_every_row_once_over_all_ranks(
    stores, seed, epoch, world_size, batch_size, block_rows, buffer_rows, drop
) -> None:
    stores = opened(stores)
    subset = sorted(set(range(COUNT)) - drop)
    options = {
        "seed": seed,
        "world_size": world_size,
        "batch_size": batch_size,
        "subset": subset,
        "params": ReadingParams(block_rows=block_rows, buffer_rows=buffer_rows),
    }
    ranks = [shuffled(stores, rank=rank, **options) for rank in range(world_size)]
    orders = [reader.order(epoch) for reader in ranks]
    assert sorted(np.concatenate(orders)) == sorted(set(subset) - set(FAILED))
    lengths = {len(order) for order in orders}
    num_rows = sum(map(len, orders))
    steps = -(-num_rows // batch_size)
    assert max(lengths) - min(lengths) <= steps
    assert {len(reader) for reader in ranks} == {steps}
    again = shuffled(stores, rank=0, **options).order(epoch)
    np.testing.assert_array_equal(again, orders[0])


@given(
    subset=st.sets(st.integers(0, COUNT - 1), min_size=1).map(sorted),
    batch_size=st.integers(1, 30),
    block_rows=st.integers(1, 20),
    buffer_rows=st.integers(1, 60),
    before=st.integers(1, 8),
    after=st.integers(1, 8),
    cut=st.integers(0, 80),
    drop_last=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_steps_are_the_same_on_any_number_of_ranks_also_after_a_cut(
    stores, subset, batch_size, block_rows, buffer_rows, before, after, cut, drop_last
) -> None:
    params = ReadingParams(block_rows=block_rows, buffer_rows=buffer_rows)
    options = {"batch_size": batch_size, "subset": subset, "params": params, "seed": 3}
    options["drop_last"] = drop_last

    def steps(world_size: int, position: dict[str, int], stop: int | None) -> list[list[int]]:
        """The rows of every step, over all ranks, in the order of ranks."""
        ranks = [
            pooled(stores, rank=rank, world_size=world_size, **options).load_state_dict(position)
            for rank in range(world_size)
        ]
        parts = [[batch.rows.tolist() for batch in islice(reader, stop)] for reader in ranks]
        assert {len(part) for part in parts} == {len(parts[0])}
        for step in zip(*parts):
            assert max(map(len, step)) - min(map(len, step)) <= 1
        return [list(chain.from_iterable(step)) for step in zip(*parts)]

    alone = steps(1, at(2, 0, batch_size), None)
    cut = min(cut, len(alone))
    begun = steps(before, at(2, 0, batch_size), cut)
    assert begun + steps(after, at(2, cut, batch_size), None) == alone
    rows = list(chain.from_iterable(alone))
    assert len(rows) == len(set(rows))
    usable = sorted(set(subset) - set(FAILED))
    if drop_last:
        assert len(rows) == len(usable) // batch_size * batch_size
    else:
        assert sorted(rows) == usable


def test_one_process_keeps_the_order_that_it_had(stores: Stores) -> None:
    """Written down when each process had an order of its own."""
    order = shuffled(stores, params=ReadingParams(block_rows=8, buffer_rows=24)).order(1)
    assert order[:12].tolist() == [11, 56, 14, 80, 10, 60, 57, 82, 63, 12, 59, 81]


def test_a_position_of_other_batches_or_of_an_order_per_process_is_refused(stores: Stores) -> None:
    with pytest.raises(InputError, match="when every process had an order of its own.*train anew"):
        shuffled(stores).load_state_dict({"epoch": 0, "step": 3})
    with pytest.raises(InputError, match="batches of 20 rows over all processes, not 10"):
        shuffled(stores).load_state_dict(at(0, 3, 20))


def test_each_rank_reads_its_own_rows_and_no_more(stores: Stores) -> None:
    for rank in range(4):
        reader = shuffled(stores, rank=rank, world_size=4, batch_size=8)
        windows = list(reader.windows(0))
        for window in windows:
            np.testing.assert_array_equal(np.concatenate([*window.pieces, []]), window.rows)
        taken = np.concatenate([batch.rows for batch in reader])
        assert sorted(np.concatenate([window.rows for window in windows])) == sorted(taken)


@given(step=st.integers(0, 16), epoch=st.integers(0, 2), rank=st.integers(0, 1))
@settings(max_examples=12, deadline=None)
def test_an_epoch_can_be_entered_at_any_step(stores, step: int, epoch: int, rank: int) -> None:
    options = {"rank": rank, "world_size": 2, "batch_size": 5}
    whole = shuffled(stores, **options).load_state_dict(at(epoch, 0, 5))
    batches = list(whole)
    np.testing.assert_array_equal(np.concatenate([b.rows for b in batches]), whole.order(epoch))
    entered = list(shuffled(stores, **options).load_state_dict(at(epoch, step, 5)))
    assert len(entered) == len(batches) - step
    for one, other in zip(batches[step:], entered):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.arrays["embedding"], other.arrays["embedding"])


def test_state_counts_what_was_handed_out(stores: Stores) -> None:
    reader = shuffled(stores)
    first = []
    for batch in reader:
        first.append(batch.rows)
        if len(first) == 3:
            break
    assert reader.state_dict() == at(0, 3)
    rest = [batch.rows for batch in shuffled(stores).load_state_dict(reader.state_dict())]
    np.testing.assert_array_equal(np.concatenate([*first, *rest]), shuffled(stores).order(0))


def test_an_iteration_ends_the_one_that_was_left_half_way(stores: Stores) -> None:
    reader = shuffled(stores)
    left = iter(reader)
    first = next(left).rows
    # Both would read ahead, from the same files.
    rest = [batch.rows for batch in reader]
    np.testing.assert_array_equal(np.concatenate([first, *rest]), shuffled(stores).order(0))
    assert next(left, None) is None
    assert reader.state_dict() == at(1, 0)


def test_order_is_mixed_in_two_levels(stores: Stores) -> None:
    reader = shuffled(stores, params=ReadingParams(block_rows=8, buffer_rows=24))
    orders = [reader.order(0), reader.order(1), shuffled(stores, seed=1).order(0)]
    for i in range(3):
        for j in range(i):
            assert (orders[i] != orders[j]).any()
    # Every window of rows comes from three blocks, and is mixed within.
    window = orders[0][:20]
    assert len(set(window // 8)) <= 4
    assert np.count_nonzero(np.diff(window) == 1) < 8


def test_batches_stay_as_they_were_handed_out(stores: Stores) -> None:
    kept = list(shuffled(stores, params=PARAMS.model_copy(update={"prefetch": 1})))
    kept += list(shuffled(stores).load_state_dict(at(1, 0)))
    for batch in kept:
        np.testing.assert_array_equal(
            batch.arrays["embedding"], read_rows(stores[0], batch.rows)["embedding"]
        )


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    memory = Memory((3, 2), np.dtype(np.float16))
    first = memory.empty(4)
    place = first.ctypes.data
    view = first[1:2, 0].T
    del first
    assert memory.empty(4).ctypes.data != place
    view[...] = 7
    del view
    again = [memory.empty(size) for size in (3, 5, 4)]
    assert place in [array.ctypes.data for array in again]
    assert len({array.ctypes.data for array in again}) == 3
    assert [array.shape for array in again] == [(3, 3, 2), (5, 3, 2), (4, 3, 2)]
    tensor = torch.from_numpy(again.pop())
    place = tensor.data_ptr()
    assert memory.empty(4).ctypes.data != place
    assert memory.empty(0).shape == (0, 3, 2)


def test_drop_last_gives_full_batches_only(stores: Stores) -> None:
    for rank in range(3):
        reader = shuffled(stores, rank=rank, world_size=3, batch_size=24, drop_last=True)
        assert [len(batch.rows) for batch in reader] == [8, 8, 8]


def test_nothing_to_read(tmp_path: Path) -> None:
    fill_sample(tmp_path / "s.zarr", [])
    sources = {"embedding": (tmp_path / "s.zarr", "embedding")}
    assert list(ShuffledRows(sources, batch_size=3, seed=0)) == []
    assert list(iterate_blocks(tmp_path / "s.zarr")) == []
    assert read_rows(tmp_path / "s.zarr", [])["embedding"].shape == (0, 5, 6)


def test_rows_by_number(stores: Stores, rows: list[str]) -> None:
    wanted = [70, 3, 3, 82, 21]
    found = read_rows(stores[0], wanted)
    np.testing.assert_array_equal(
        found["embedding"], encode([rows[i] for i in wanted])["embedding"].astype(np.float16)
    )
    with pytest.raises(RowsUnavailableError, match="row 40 is failed"):
        read_rows(stores[0], [1, 40])
    with pytest.raises(RowsUnavailableError, match="rows 0 to 82"):
        read_rows(stores[0], [83])
    with pytest.raises(KeyError, match="no array 'embeding'"):
        read_rows(stores[0], [1], ["embeding"])


@pytest.mark.parametrize("which", [0, 1])
def test_blocks_in_order(stores: Stores, which: int) -> None:
    blocks = list(iterate_blocks(stores[which], ["pooled"], block_rows=16))
    numbers = np.concatenate([block.rows for block in blocks])
    np.testing.assert_array_equal(numbers, sorted(set(range(COUNT)) - set(FAILED)))
    plain = np.asarray(zarr.open_group(stores[which], mode="r")["pooled"])
    for block in blocks:
        np.testing.assert_array_equal(block.arrays["pooled"], plain[block.rows])
    some = list(iterate_blocks(stores[which], block_rows=16, subset=[2, 40, 77]))
    np.testing.assert_array_equal(np.concatenate([block.rows for block in some]), [2, 77])


def test_straight_reading_agrees_with_zarr(tmp_path: Path) -> None:
    """Uncompressed shards are read past Zarr: any range, missing shards, all-zero chunks."""
    spec = make_spec(shard_rows=8)
    path, rows = tmp_path / "s.zarr", captions(30)
    fill_sample(path, rows, spec=spec)
    group = zarr.open_group(path, mode="r+")
    (path / "embedding/c/1/0/0").unlink()
    group["pooled"][16:24] = 0
    assert not (path / "pooled/c/2/0").exists()
    plain = np.asarray(group["embedding"])
    store = open_store(path)
    for start, stop in [(0, 30), (3, 4), (7, 18), (15, 17), (29, 30), (5, 5)]:
        np.testing.assert_array_equal(
            store.read_stored("embedding", start, stop), plain[start:stop]
        )


@pytest.mark.parametrize("inner_bytes", [1, 140, 10**6])
def test_straight_writing_makes_the_file_that_zarr_makes(
    inner_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, partial and all-zero shards, in inner chunks of one, two and all rows."""
    monkeypatch.setattr(layout, "INNER_CHUNK_BYTES", inner_bytes)
    spec = make_spec(shard_rows=8)
    for count in range(9):
        values = np.random.default_rng(count).normal(size=(count, 5, 6)).astype(np.float16)
        values[2:4] = 0
        for stored in (values, np.zeros_like(values), -np.zeros_like(values)):
            straight = b"".join(shards.shard_content(spec, "embedding", stored))
            assert straight == b"".join(shards._through_zarr(spec, "embedding", stored))
            assert bool(straight) == any(stored.tobytes())


def test_stores_of_different_tables_are_not_joined(
    stores: Stores, rows: list[str], tmp_path: Path
) -> None:
    fill_sample(tmp_path / "a.zarr", rows[:-1])
    fill_sample(tmp_path / "b.zarr", [*rows[:60], "other", *rows[61:]])
    with pytest.raises(StoresDifferError, match="83 rows.*82"):
        shuffled((stores[0], tmp_path / "a.zarr", stores[2]))
    with pytest.raises(StoresDifferError, match="from row 60 on"):
        shuffled((stores[0], tmp_path / "b.zarr", stores[2]))


def test_pending_rows_are_not_read_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, captions(12))
    open_store(path, writable=True).mark_pending(np.array([3, 4]))
    with pytest.raises(RowsUnavailableError, match="2 rows are pending"):
        ShuffledRows({"pooled": (path, "pooled")}, batch_size=2, seed=0)
    reader = ShuffledRows({"pooled": (path, "pooled")}, batch_size=2, seed=0, subset=range(5, 12))
    assert reader.num_rows == 7


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_damage_stops_the_epoch_or_is_skipped(tmp_path: Path, compressor: str) -> None:
    path, rows = tmp_path / "s.zarr", captions(40)
    fill_sample(path, rows, spec=make_spec(compressor=compressor))
    shard = path / "embedding/c/2/0/0"
    content = bytearray(shard.read_bytes())
    content[70 if compressor == "none" else 12] ^= 1
    shard.write_bytes(content)
    sources = {"embedding": (path, "embedding")}
    with pytest.raises(DamagedRowsError, match=r"c/2/0/0 \(shard 2\): row (1[6-9]|2[0-3])"):
        list(ShuffledRows(sources, batch_size=4, seed=0, params=PARAMS))
    skipping = PARAMS.model_copy(update={"on_damage": "skip"})
    reader = ShuffledRows(sources, batch_size=4, seed=0, params=skipping)
    found = []
    for batch in reader:
        want = np.stack([value(rows[i]) for i in batch.rows]).astype(np.float16)
        np.testing.assert_array_equal(batch.arrays["embedding"], want)
        found += batch.rows.tolist()
    # Uncompressed, a bit is in one row; compressed, an inner chunk (here a whole shard) is lost.
    lost = [17] if compressor == "none" else list(range(16, 24))
    assert sorted(reader.damaged) == lost
    assert sorted(found) == sorted(set(range(40)) - set(lost))
    with pytest.raises(DamagedRowsError):
        read_rows(path, [lost[0]])


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_a_file_that_changes_between_epochs_is_noticed(tmp_path: Path, compressor: str) -> None:
    path, rows = tmp_path / "s.zarr", captions(40)
    fill_sample(path, rows, spec=make_spec(compressor=compressor))
    shard = path / "embedding/c/2/0/0"
    sound = shard.read_bytes()
    reader = ShuffledRows({"embedding": (path, "embedding")}, batch_size=4, seed=0, params=PARAMS)
    for damaged in (sound[:70] + bytes([sound[70] ^ 1]) + sound[71:], b"", None):
        assert sum(len(batch.rows) for batch in reader) == 40
        assert sum(len(batch.rows) for batch in reader) == 40
        if damaged is None:
            shard.unlink()
        else:
            with shard.open("r+b") as f:  # in place: the file stays the same one
                f.truncate(len(damaged))
                f.write(damaged)
        with pytest.raises(DamagedRowsError, match=r"c/2/0/0 \(shard 2\)"):
            list(reader)
        shard.write_bytes(sound)
        reader.load_state_dict(at(0, 0, 4))
