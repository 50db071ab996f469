"""The checked table: whatever way rows are asked for, they are the rows that were written."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpora.caption_sources import CaptionTableError
from corpora.caption_table import CaptionTable, CaptionTableWriter, CheckedRow
from corpora.records import CaptionRow

N = 10_000  # three row groups of 4096


def checked_row(place: int) -> CheckedRow:
    split = ("train", "train", "val", "test")[place % 4]
    picture = (place // 5).to_bytes(16, "little")
    return CheckedRow(
        f"id {place}", f"{place // 5}.jpg", f"caption é{place}", split, place, picture
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "captions.parquet"
    with CaptionTableWriter(path, "some/folder") as writer:
        for place in range(N):
            writer.append(checked_row(place))
        writer.close()
    return path


@pytest.fixture(scope="module")
def table(path: Path) -> CaptionTable:
    return CaptionTable(path)


def test_rows_in_order(table: CaptionTable) -> None:
    rows = list(table)
    assert len(rows) == len(table) == N
    assert rows[4096] == CaptionRow("id 4096", "some/folder/819.jpg", "caption é4096", "train")
    assert [row.caption for row in rows] == [f"caption é{place}" for place in range(N)]
    assert list(table.rows(4090, 4100)) == rows[4090:4100]
    assert list(table.rows(9999, 99_999)) == rows[9999:]
    assert list(table.rows(N)) == []


def test_any_rows_in_the_order_asked_for(table: CaptionTable) -> None:
    asked = np.random.default_rng(0).integers(0, N, 300)
    assert table.captions(asked) == [f"caption é{place}" for place in asked]
    assert table.images([9999, 0, 9999]) == [
        "some/folder/1999.jpg",
        "some/folder/0.jpg",
        "some/folder/1999.jpg",
    ]
    assert table.pictures([7]) == [(1).to_bytes(16, "little")]
    assert table[8192].id == "id 8192"
    assert table.captions([]) == []
    for outside in (-1, N):
        with pytest.raises(IndexError, match=f"rows 0 to 9999, not {outside}"):
            table.captions([0, outside])


def test_splits_and_ids(table: CaptionTable) -> None:
    assert table.rows_of_split("val").tolist() == list(range(2, N, 4))
    assert len(table.rows_of_split("train")) == N // 2
    with pytest.raises(ValueError, match="split 'dev' is none of train, val, test"):
        table.rows_of_split("dev")
    assert [table.find(f"id {place}") for place in (0, 4096, 9999)] == [0, 4096, 9999]
    with pytest.raises(KeyError, match="no row with id 'id 10000'"):
        table.find("id 10000")


def test_keys_and_fingerprints(table: CaptionTable, tmp_path: Path) -> None:
    keys = table.row_keys()
    assert keys.shape == (N, 16)
    assert keys.dtype == np.uint8
    assert keys[5000].tobytes() == checked_row(5000).key
    assert len(np.unique(keys, axis=0)) == N
    with CaptionTableWriter(tmp_path / "first.parquet", "elsewhere") as writer:
        for place in range(5000):
            writer.append(checked_row(place))
        fingerprint = writer.close()
    first = CaptionTable(tmp_path / "first.parquet")
    assert fingerprint == first.fingerprint != table.fingerprint
    np.testing.assert_array_equal(first.row_keys(), keys[:5000])


def test_the_key_depends_on_picture_and_caption_alone() -> None:
    row = checked_row(3)
    assert row._replace(id="x", image="x", split="val", row=9).key == row.key
    assert row._replace(caption="x").key != row.key
    assert row._replace(picture=b"x" * 16).key != row.key


def test_many_threads_read_the_right_rows(path: Path) -> None:
    table = CaptionTable(path)
    asked = np.random.default_rng(1).integers(0, N, (64, 20))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(table.captions, asked))
    assert found == [[f"caption é{place}" for place in places] for places in asked]


def test_blocks_are_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpora.caption_table._MAX_CACHED_GROUPS", 2)
    table = CaptionTable(path)
    for _ in table:
        assert len(table._cache) <= 2


def test_an_unfinished_table_never_appears(tmp_path: Path) -> None:
    path = tmp_path / "captions.parquet"
    with CaptionTableWriter(path, "") as writer:
        writer.append(checked_row(0))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checked_table(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    with pytest.raises(CaptionTableError, match="no such file"):
        CaptionTable(path)
    path.write_text("caption\timage\n")
    with pytest.raises(CaptionTableError, match="not a readable Parquet file"):
        CaptionTable(path)
    pq.write_table(pa.table({"caption": ["a"], "image": ["b"]}), path)
    with pytest.raises(CaptionTableError, match="not a checked caption table; check it first"):
        CaptionTable(path)
