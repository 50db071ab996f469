"""Damage is found by file and row, and repaired by encoding just that again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_cache_samples import captions, files, fill_sample, make_spec

from cache import VerifyReport, manifest_location, open_store, repair, verify

COUNT = 28  # shards of 8: 8, 8, 8, 4


@pytest.fixture
def rows() -> list[str]:
    rows = captions(COUNT)
    rows[10] = "unreadable"
    return rows


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


ROW_BYTES = 5 * 6 * 2  # of `embedding`, float16


@pytest.mark.parametrize(
    ("damage", "bad", "reason"),
    [
        (lambda shard: flip(shard, 3 * ROW_BYTES + 7), [11], "checksum differs"),
        (truncate, [8, 9, 11, 12, 13, 14, 15], "without a valid shard index"),
        (lambda shard: shard.write_bytes(b""), [8, 9, 11, 12, 13, 14, 15], "valid shard index"),
        (Path.unlink, [8, 9, 11, 12, 13, 14, 15], "checksum differs"),
        (lambda shard: flip(shard, -2), [8, 9, 11, 12, 13, 14, 15], "valid shard index"),
    ],
    ids=["bit in a row", "truncated", "empty", "deleted", "bit in the index"],
)
def test_damage_is_named_and_repaired(
    tmp_path: Path,
    rows: list[str],
    damage: Callable[[Path], None],
    bad: list[int],
    reason: str,
) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, rows)
    sound = files(path)
    shard = path / "embedding/c/1/0/0"
    damage(shard)
    report = verify(path)
    assert not report.ok
    assert [(b.array, b.shard, b.file) for b in report.bad_shards] == [("embedding", 1, str(shard))]
    assert report.bad_rows == bad
    assert reason in str(report)
    assert str(shard) in str(report)

    assert repair(path, report).bad_rows == bad
    assert not manifest_location(path).path.exists()
    log = tmp_path / "log"
    log.mkdir()
    assert fill_sample(path, rows, log=log).encoded == len(bad)
    again = {name for file in log.iterdir() for name in file.read_text().split("\n")[:-1]}
    assert again == {rows[i] for i in bad}
    assert files(path) == sound
    assert verify(path).ok


def test_a_compressed_shard_loses_no_other(tmp_path: Path, rows: list[str]) -> None:
    path, spec = tmp_path / "s.zarr", make_spec(compressor="zstd")
    fill_sample(path, rows, spec=spec)
    sound = files(path)
    flip(path / "embedding/c/2/0/0", 20)
    truncate(path / "embedding/c/0/0/0")
    report = repair(path)
    assert [b.shard for b in report.bad_shards] == [0, 2]
    assert report.bad_rows == [*range(8), *range(16, 24)]
    assert fill_sample(path, rows, spec=spec).encoded == 16
    assert files(path) == sound


def test_a_sound_store(tmp_path: Path, rows: list[str]) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, rows)
    told: list[tuple[int, int]] = []
    report = verify(path, progress=lambda *counts: told.append(counts))
    assert report == VerifyReport(str(path), COUNT, checked=2 * 27)
    assert told[-1] == (54, 54)
    assert "54 stored rows match" in str(report)
    before = files(path)
    assert repair(path).ok
    assert files(path) == before


@pytest.mark.parametrize("table", ["row_status", "row_key", "embedding_checksum"])
def test_damaged_bookkeeping(tmp_path: Path, rows: list[str], table: str) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, rows)
    sound = files(path)
    flip(path / table / "c/0", 9)
    report = verify(path)
    assert report.damaged_tables == {table: [range(COUNT)]}
    assert f"{table}: rows 0 to 27 cannot be read" in str(report)
    repair(path, report)
    assert fill_sample(path, rows).encoded == COUNT
    assert verify(path).ok
    assert files(path) == sound


def test_a_shard_of_another_store_is_noticed(tmp_path: Path, rows: list[str]) -> None:
    """Shard and checksums exchanged together: only the manifest can tell."""
    path = tmp_path / "s.zarr"
    fill_sample(path, rows)
    stated = manifest_location(path).read_text()
    changed = [*rows[:20], "other", *rows[21:]]
    fill_sample(path, changed)
    assert stated is not None
    manifest_location(path).write_text(stated)
    report = verify(path)
    assert any("shard 2 of embedding is another one" in line for line in report.manifest)
    assert not any("shard 1" in line for line in report.manifest)


def test_a_kept_row_that_is_damaged_is_encoded_again(tmp_path: Path, rows: list[str]) -> None:
    """A shard that is completed keeps its rows only as far as they match their checksums."""
    path = tmp_path / "s.zarr"
    fill_sample(path, rows)
    flip(path / "embedding/c/3/0/0", ROW_BYTES)  # row 25, in the shard that the new rows join
    more = [*rows, "new", "newer"]
    fill_sample(path, more)
    fresh = tmp_path / "fresh.zarr"
    fill_sample(fresh, more)
    assert verify(path).ok
    np.testing.assert_array_equal(
        open_store(path).read_stored("embedding", 0, 30),
        open_store(fresh).read_stored("embedding", 0, 30),
    )
