"""A table that grows, loses rows or has another order costs its new rows alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_cache_samples import captions, files, fill_sample, make_spec, value

from cache import (
    EmbeddingStore,
    RowStatus,
    RowsUnavailableError,
    begin_with_rows,
    compact,
    copy_rows,
    drop_rows,
    iterate_blocks,
    open_store,
    read_manifest,
    read_rows,
    verify,
)
from gill_errors import InputError

ROWS = captions(30)
SPECS = {
    "float16": make_spec(),
    "int8": make_spec(dtype="int8", share_first=True, compressor="blosc-zstd"),
}


@pytest.fixture(scope="module", params=SPECS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "source.zarr"
    fill_sample(path, ROWS, spec=SPECS[kind])
    return path


def test_appending_leaves_whole_shards_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, ROWS)

    def shards() -> dict[str, tuple[int, int]]:
        stats = {p.parent.parent.name: p.stat() for p in path.glob("embedding/c/*/0/0")}
        return {shard: (stat.st_ino, stat.st_mtime_ns) for shard, stat in stats.items()}

    before = shards()
    assert fill_sample(path, captions(41)).encoded == 11
    after = shards()
    assert sorted(after) == ["0", "1", "2", "3", "4", "5"]
    assert {n for n in before if before[n] == after[n]} == {"0", "1", "2"}  # the fourth was cut


def test_lost_and_moved_rows_are_kept_and_new_ones_alone_encoded(
    source: Path, kind: str, tmp_path: Path
) -> None:
    left = [29, *range(25), 3]  # four lost, one moved, one twice
    copy = copy_rows(source, tmp_path / "copy.zarr", left)
    assert copy.status_counts() == {"pending": 0, "done": 27, "failed": 0}
    for name, values in read_rows(source, left).items():
        np.testing.assert_array_equal(read_rows(copy, range(27))[name], values)
    assert verify(tmp_path / "copy.zarr").ok
    table = [*(ROWS[i] for i in left), "new", "newer"]
    report = fill_sample(tmp_path / "copy.zarr", table, spec=SPECS[kind])
    assert (report.encoded, report.skipped) == (2, 27)
    assert verify(tmp_path / "copy.zarr").ok
    np.testing.assert_array_equal(
        read_rows(tmp_path / "copy.zarr", [0])["embedding"], read_rows(source, [29])["embedding"]
    )


def test_rows_that_the_source_lacks_are_pending_and_whole_shards_that_stay_are_linked(
    source: Path, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "copy.zarr"
    copy_rows(source, path, [*range(18), -1, *range(20, 30)])  # shards of 8: the third has a hole
    assert np.flatnonzero(open_store(path).status() == RowStatus.PENDING).tolist() == [18]
    inodes = [
        {p.relative_to(s).as_posix(): p.stat().st_ino for p in s.glob("embedding/c/*/0/0")}
        for s in (source, path)
    ]
    alike = {name for name in inodes[1] if inodes[0].get(name) == inodes[1][name]}
    assert alike == {"embedding/c/0/0/0", "embedding/c/1/0/0"}
    table = [*ROWS[:18], "new", *ROWS[20:]]
    report = fill_sample(path, table, spec=SPECS[kind])
    assert (report.encoded, report.skipped, report.notes) == (1, 28, [])
    assert verify(path).ok
    assert verify(source).ok
    with pytest.raises(RowsUnavailableError):
        copy_rows(source, tmp_path / "other.zarr", [-2])
    (path / "pooled/c/1/0").unlink()  # of the copy's two names
    again = copy_rows(path, tmp_path / "again.zarr", range(29))
    assert np.flatnonzero(again.status() == RowStatus.PENDING).tolist() == list(range(8, 16))


def test_a_copy_of_all_rows_is_the_store(source: Path, tmp_path: Path) -> None:
    copy_rows(source, tmp_path / "copy.zarr", range(30))
    assert files(tmp_path / "copy.zarr") == files(source)
    manifests = (source.with_name("source.manifest.json"), tmp_path / "copy.manifest.json")
    assert manifests[0].read_bytes() == manifests[1].read_bytes()


def test_a_killed_copy_goes_on(
    source: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, path = EmbeddingStore.commit, tmp_path / "copy.zarr"

    def dies(store: EmbeddingStore, result: object) -> None:
        if result.shard == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        commit(store, result)  # type: ignore[arg-type]

    monkeypatch.setattr(EmbeddingStore, "commit", dies)
    with pytest.raises(KeyboardInterrupt):
        copy_rows(source, path, range(30))
    assert open_store(path).status_counts()["done"] == 16
    assert not path.with_name("copy.manifest.json").exists()
    monkeypatch.setattr(EmbeddingStore, "commit", commit)
    copy_rows(source, path, range(30))
    assert files(path) == files(source)


def test_a_store_is_begun_with_the_rows_that_another_has_or_not_at_all(
    source: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new.zarr"
    assert begin_with_rows(source, path, ["quite", "other"]) == 0
    assert not path.exists()
    table = [ROWS[7], "new", *ROWS[9:30], ROWS[7]]

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingStore, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            begin_with_rows(source, path, table)
    assert not path.exists()
    assert begin_with_rows(source, path, table) == 23
    assert [p.name for p in tmp_path.iterdir()] == ["new.zarr"]
    assert fill_sample(path, table, spec=SPECS[kind]).encoded == 1
    np.testing.assert_array_equal(
        read_rows(path, [0, 2, 22, 23])["embedding"],
        read_rows(source, [7, 9, 29, 7])["embedding"],
    )
    assert begin_with_rows(source, tmp_path / "longer.zarr", [*ROWS, "more"]) == 30
    shards = (s / "embedding/c/3/0/0" for s in (source, tmp_path / "longer.zarr"))
    assert len({shard.stat().st_ino for shard in shards}) == 1


def test_rows_that_are_not_right_are_pending_in_the_copy(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", captions(30)
    rows[4] = "unreadable"
    fill_sample(path, rows)
    with (path / "embedding/c/1/0/0").open("r+b") as file:
        file.write(b"\xff\xff\xff")  # row 8, the first of the second shard
    copy = copy_rows(path, tmp_path / "copy.zarr", range(2, 20))
    assert np.flatnonzero(copy.status() == 0).tolist() == [2, 6]
    assert not (tmp_path / "copy.manifest.json").exists()
    rows[4] = "caption 4"
    assert fill_sample(tmp_path / "copy.zarr", rows[2:20]).encoded == 2
    assert verify(tmp_path / "copy.zarr").ok
    # Once more: what was filled meanwhile stays.
    again = copy_rows(path, tmp_path / "copy.zarr", range(2, 20))
    assert verify(tmp_path / "copy.zarr").ok
    assert again.status()[6] == 1
    # Nor is it copied over for the sake of a row beside it.
    open_store(tmp_path / "copy.zarr", writable=True).mark_pending(np.array([5]))
    assert copy_rows(path, tmp_path / "copy.zarr", range(2, 20)).status()[4:8].tolist() == [
        1,
        0,
        1,
        1,
    ]


def test_what_cannot_be_copied(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RowsUnavailableError, match="rows 0 to 29"):
        copy_rows(source, tmp_path / "copy.zarr", [3, 30])
    with pytest.raises(InputError, match="onto itself"):
        copy_rows(source, source, [3])
    assert not (tmp_path / "copy.zarr").exists()


def test_a_target_whose_bytes_mean_other_numbers_is_refused_and_left_alone(tmp_path: Path) -> None:
    spec = SPECS["int8"]
    fill_sample(tmp_path / "s.zarr", ROWS, spec=spec)
    fill_sample(tmp_path / "t.zarr", [f"quite other {i}" for i in range(30)], spec=spec)
    before = read_rows(tmp_path / "t.zarr", range(30))
    with pytest.raises(InputError, match=r"was filled from other rows: its .* name a new path"):
        copy_rows(tmp_path / "s.zarr", tmp_path / "t.zarr", range(30))
    assert verify(tmp_path / "t.zarr").ok
    for name, values in read_rows(tmp_path / "t.zarr", range(30)).items():
        np.testing.assert_array_equal(values, before[name])


def test_dropped_rows_are_marked_in_place_and_left_out_by_compact(
    source: Path, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(source, path)
    before = {name: content for name, content in files(path).items() if "/c/" in name}
    drop_rows(path, [0, 9, 29])
    after = files(path)
    assert {name for name in before if before[name] != after[name]} == {"row_status/c/0"}
    assert verify(path).ok
    assert read_manifest(path)["status"] == {"pending": 0, "done": 27, "failed": 3}
    assert open_store(path).failures()[9] == "dropped: gone from the table"
    with pytest.raises(RowsUnavailableError, match="row 9 is failed"):
        read_rows(path, [8, 9])
    left = [i for i in range(30) if i not in (0, 9, 29)]
    assert sorted(row for batch in iterate_blocks(path) for row in batch.rows) == left
    assert fill_sample(path, ROWS, spec=SPECS[kind]).encoded == 0, "dropped rows stay so"

    compact(path, tmp_path / "small.zarr")
    assert (
        fill_sample(tmp_path / "small.zarr", [ROWS[i] for i in left], spec=SPECS[kind]).done == 27
    )
    for name, values in read_rows(source, left).items():
        np.testing.assert_array_equal(read_rows(tmp_path / "small.zarr", range(27))[name], values)

    report = fill_sample(path, ROWS, spec=SPECS[kind], retry_failed=True)
    assert report.encoded == 3, "a table that has them after all"
    with pytest.raises(RowsUnavailableError, match="rows 0 to 29"):
        drop_rows(path, [30])


def test_a_dropped_row_does_not_come_back_with_its_shard(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, ROWS)
    drop_rows(path, [2])
    (path / "embedding/c/0/0/0").unlink()
    assert fill_sample(path, ["changed", *ROWS[1:]]).encoded == 1
    assert np.flatnonzero(open_store(path).status() == RowStatus.FAILED).tolist() == [2]
    assert verify(path).ok, "the other rows of the shard are encoded again"
    left = [0, 1, *range(3, 30)]
    values = [value(name) for name in ("changed", ROWS[1], *ROWS[3:])]
    np.testing.assert_array_equal(
        read_rows(path, left)["embedding"], np.stack(values).astype(np.float16)
    )


def test_a_store_with_pending_rows_is_not_compacted(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, ROWS)
    open_store(path, writable=True).mark_pending(np.array([4, 5]))
    with pytest.raises(RowsUnavailableError, match="2 rows are pending; fill it first"):
        compact(path, tmp_path / "small.zarr")
    assert not (tmp_path / "small.zarr").exists()
