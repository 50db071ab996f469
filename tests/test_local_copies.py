"""Shards read through copies of a bounded size, shared by processes, whatever is killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_cache_samples import CHANNELS, POSITIONS, captions, fill_sample, make_spec, value

from cache import ReadingParams, ShuffledRows, StoreUnreachableError, open_store
from cache.local_copies import LocalCopies
from cache.location import Location
from cache.reading import DamagedRowsError
from cache.shards import max_shard_bytes
from gill_errors import InputError

ROWS, SHARD_ROWS = 160, 8
SHARD_BYTES = max_shard_bytes(make_spec(SHARD_ROWS), "embedding")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of a store was fetched."""
    counted: Counter[str] = Counter()
    download = Location.download

    def counting(self: Location, target: Path, *inside: str) -> None:
        counted["/".join(inside)] += 1
        download(self, target, *inside)

    monkeypatch.setattr(Location, "download", counting)
    return counted


def shuffled(store: Path | str, folder: Path, shards: float, **options: object) -> ShuffledRows:
    """Rows of `embedding` by whole shards, through copies of so many."""
    return ShuffledRows(
        {"embedding": (store, "embedding")},
        batch_size=SHARD_ROWS,
        seed=3,
        params=ReadingParams(
            block_rows=SHARD_ROWS,
            buffer_rows=2 * SHARD_ROWS,
            cache_limit=int(shards * SHARD_BYTES),
            cache_folder=str(folder),
            **options,
        ),
    )


def read_epoch(rows: ShuffledRows, folder: Path, limit: float) -> None:
    """Every row comes once and is right; the folder stays within its limit."""
    seen = []
    for batch in rows:
        for row, values in zip(batch.rows, batch.arrays["embedding"]):
            np.testing.assert_array_equal(values, value(f"caption {row}").astype(np.float16))
            seen.append(row)
        with LocalCopies(folder, 0)._names_locked():
            files = [path.stat().st_size for path in folder.glob("*.shard")]
        assert sum(files) <= limit * SHARD_BYTES
    assert sorted(seen) == list(range(ROWS))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "s.zarr"
    fill_sample(path, captions(ROWS), spec=make_spec(SHARD_ROWS))
    return path


def test_an_epoch_through_half_of_the_room_fetches_each_shard_once(
    store: Path, tmp_path: Path, downloads: Counter[str]
) -> None:
    folder, limit = tmp_path / "copies", ROWS / SHARD_ROWS / 2
    rows = shuffled(store, folder, limit)
    read_epoch(rows, folder, limit)
    assert set(downloads.values()) == {1}
    assert len(downloads) == ROWS // SHARD_ROWS
    # The order is that of an epoch without copies.
    plain = ReadingParams(block_rows=SHARD_ROWS, buffer_rows=2 * SHARD_ROWS)
    sources = {"embedding": (store, "embedding")}
    there = ShuffledRows(sources, batch_size=SHARD_ROWS, seed=3, params=plain)
    assert rows.order(0).tolist() == there.order(0).tolist()
    # What is there still is not fetched in the second.
    read_epoch(rows, folder, limit)
    assert downloads.total() < 2 * ROWS // SHARD_ROWS


def test_asking_the_system_for_rows_ahead_fetches_no_copy(
    store: Path, tmp_path: Path, downloads: Counter[str]
) -> None:
    rows = shuffled(store, tmp_path / "copies", shards=4)
    (source,) = rows._sources.values()
    window = next(rows.windows(0))
    source.prepare(window)  # as late as when the rows have been read and their copy is gone
    assert not downloads
    for shard in source.shards(window):
        source.store.fetch_shard("embedding", shard)
    source.prepare(window)
    assert set(downloads.values()) == {1}


def test_all_in_the_copies_is_fetched_once_for_all(
    store: Path, tmp_path: Path, downloads: Counter[str]
) -> None:
    for _ in range(2):
        read_epoch(shuffled(store, tmp_path / "copies", 20), tmp_path / "copies", 20)
    assert set(downloads.values()) == {1}


def test_a_limit_below_a_shard_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cache_limit is .* bytes, but embedding/c/"):
        list(shuffled(store, tmp_path / "copies", 0.5))


def test_a_changed_shard_is_another_copy(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    read_epoch(shuffled(store, folder, 20), folder, 20)
    rows = [f"other {i}" for i in range(ROWS)]
    fill_sample(store, rows, spec=make_spec(SHARD_ROWS))
    for batch in shuffled(store, folder, 20):
        want = np.stack([value(rows[row]) for row in batch.rows]).astype(np.float16)
        np.testing.assert_array_equal(batch.arrays["embedding"], want)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_named_and_its_copy_not_kept(store: Path, tmp_path: Path, damage: str) -> None:
    folder, shard = tmp_path / "copies", store / "embedding" / "c" / "3" / "0" / "0"
    content = shard.read_bytes()
    shard.unlink()
    if damage == "flipped":
        shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "truncated":
        shard.write_bytes(content[:-9])
    with pytest.raises(DamagedRowsError, match=rf"{shard} \(shard 3\): row (24|25|2\d|3[01])"):
        list(shuffled(store, folder, 20))
    shard.unlink(missing_ok=True)
    shard.write_bytes(content)  # brought back from elsewhere: not what the copy held
    read_epoch(shuffled(store, folder, 20), folder, 20)


def test_a_store_that_does_not_answer_is_no_damage(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Location, target: Path, *inside: str) -> None:
        remote = Location("s3://b/s.zarr", is_local=False)
        with remote.reached(*inside):
            raise TimeoutError("read timed out")

    monkeypatch.setattr(Location, "download", fail)
    rows = shuffled(store, tmp_path / "copies", 20, on_damage="skip")
    with pytest.raises(StoreUnreachableError, match=r"s3://b/s.zarr/embedding/c/\d+/0/0 cannot"):
        list(rows)
    assert not rows.damaged
    assert not list((tmp_path / "copies").glob("*.*"))


FETCHER = """
import sys, time
from pathlib import Path
from cache.local_copies import LocalCopies
from cache.location import Location
from cache import open_store

download = Location.download
def slow(self, target, *inside):
    with (Path(sys.argv[2]) / "log").open("a") as log:
        log.write("/".join(inside) + "\\n")
    target.write_bytes(b"half")
    time.sleep(float(sys.argv[4]))
    download(self, target, *inside)
Location.download = slow
store = open_store(sys.argv[1], copies=LocalCopies(Path(sys.argv[2]), int(sys.argv[3])))
for shard in range(int(sys.argv[5])):
    store.fetch_shard("embedding", shard)
"""


def fetcher(store: Path, folder: Path, limit: int, seconds: float, shards: int) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    values = [str(value) for value in (store, folder, limit, seconds, shards)]
    return subprocess.Popen([sys.executable, "-c", FETCHER, *values])


def test_processes_share_and_a_killed_one_leaves_nothing(store: Path, tmp_path: Path) -> None:
    folder, limit = tmp_path / "copies", 20 * SHARD_BYTES
    killed = fetcher(store, folder, limit, 60, 1)
    deadline = time.monotonic() + 60
    while not [p for p in folder.glob("*.partial") if p.stat().st_size]:
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (folder / f"dead.{limit}.partial").write_bytes(b"half")  # all of the room, held by nobody
    (folder / "log").unlink()
    both = [fetcher(store, folder, limit, 0.02, 4) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    names = (folder / "log").read_text().split()
    assert sorted(names) == [f"embedding/c/{shard}/0/0" for shard in range(4)]
    assert not list(folder.glob("*.partial"))
    assert len(list(folder.glob("*.shard"))) == 4
    read_epoch(shuffled(store, folder, 20), folder, 20)


def test_the_least_recently_used_goes(store: Path, tmp_path: Path) -> None:
    copies = LocalCopies(tmp_path / "copies", 3 * SHARD_BYTES)
    opened = open_store(store, copies=copies)
    for shard in (0, 1, 2, 0, 3):
        out = np.empty((1, POSITIONS, CHANNELS), np.float16)
        opened.read_stored("embedding", shard * SHARD_ROWS, shard * SHARD_ROWS + 1, out)
        np.testing.assert_array_equal(out[0], value(f"caption {shard * SHARD_ROWS}").astype("f2"))
        time.sleep(0.01)
    left = {path.name for path in copies.folder.glob("*.shard")}
    sources = [opened._shard_source("embedding", shard).copy_name for shard in range(4)]
    assert left == {f"{sources[shard]}.shard" for shard in (0, 2, 3)}
