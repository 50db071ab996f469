"""How rows are cut, how many files that makes, and how millions of rows open."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from test_cache_samples import captions, files, fill_sample, make_spec

from cache import ArraySpec, Codec, StoreSpec, open_store
from cache.layout import bookkeeping
from cache.location import locate
from cache.store import open_for_writing

MILLIONS = 3_300_000


def sd15_targets(shard_rows: int = 1024, arrays: int = 1) -> StoreSpec:
    return StoreSpec(
        arrays={
            f"embedding{i}": ArraySpec(dims={"position": 77, "channel": 768}) for i in range(arrays)
        },
        shard_rows=shard_rows,
    )


def test_files_of_a_full_store() -> None:
    spec = sd15_targets()
    assert spec.num_shards(MILLIONS) == 3223
    assert spec.most_files(MILLIONS) < 4000
    spec.check_num_files(MILLIONS)
    with pytest.raises(ValueError, match="set shard_rows to 1024"):
        sd15_targets(128).check_num_files(MILLIONS)
    two = sd15_targets(arrays=2)
    with pytest.raises(ValueError, match="set shard_rows to 2048"):
        two.check_num_files(MILLIONS)
    sd15_targets(2048, arrays=2).check_num_files(MILLIONS)


def test_most_files_is_a_close_upper_bound(tmp_path: Path) -> None:
    spec = make_spec(dtype="int8", share_first=True)
    for count in (0, 1, 60):
        rows = captions(count)
        rows[50:52] = ["unreadable"] * len(rows[50:52])
        fill_sample(tmp_path / "s.zarr", rows, spec=spec)
        found = len(files(tmp_path / "s.zarr"))
        assert found <= spec.most_files(count)
    assert spec.most_files(60) <= found + 8


def test_shard_ranges_cover_every_row_once() -> None:
    spec = make_spec(shard_rows=8)
    for count in (0, 1, 8, 19):
        ranges = [spec.shard_range(i, count) for i in range(spec.num_shards(count))]
        assert [row for span in ranges for row in span] == list(range(count))


def test_inner_chunks_divide_the_shard_and_stay_small() -> None:
    assert sd15_targets().inner_rows("embedding0") == 16  # 16 x 118 kB
    assert sd15_targets(1000).inner_rows("embedding0") == 10
    assert make_spec(shard_rows=24).inner_rows("pooled") == 24


@pytest.mark.parametrize(
    ("arrays", "constants", "message"),
    [
        ({"row_status": {"channel": 3}}, {}, "row_status"),
        ({"a": {"channel": 3}, "b": {"channel": 4}}, {}, "two sizes"),
        ({"a": {"channel": 3}}, {"a_checksum": {"channel": 3}}, "a_checksum"),
        ({"a": {"row": 3}}, {}, "reserved"),
        ({"a": {"channel": 0}}, {}, "at least 1"),
    ],
)
def test_impossible_specs_are_refused(arrays: dict, constants: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StoreSpec(
            arrays={name: ArraySpec(dims=dims) for name, dims in arrays.items()},
            constants=constants,
        )
    with pytest.raises(ValidationError, match="share_first"):
        ArraySpec(dims={"channel": 3}, codec=Codec(share_first=True))


def test_millions_of_rows_are_cheap_until_filled(tmp_path: Path) -> None:
    location = locate(tmp_path / "large.zarr")
    store = open_for_writing(location, sd15_targets(), {"model": "x"}, {})
    keys = np.arange(MILLIONS, dtype=np.uint64)
    store.match_rows(keys)
    counts = open_store(location).status_counts()
    assert counts == {"pending": MILLIONS, "done": 0, "failed": 0}
    assert len(files(location.path)) < 60
    tables = {name: open_store(location).table(name).shape[0] for name in bookkeeping(store.spec)}
    assert set(tables.values()) == {MILLIONS}
