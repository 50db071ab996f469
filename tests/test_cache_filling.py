"""Filling a store: what is encoded, what is kept, what is refused, and what a fault costs."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import xarray
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from test_cache_samples import (
    PROVENANCE,
    captions,
    empty_prompt,
    encode,
    files,
    fill_sample,
    make_roles,
    make_spec,
    read,
    value,
)

from cache import (
    FillingParams,
    FillReport,
    NotAStoreError,
    Roles,
    RowStatus,
    StoreLockedError,
    StoreMismatchError,
    fill,
    manifest_location,
    open_store,
    read_manifest,
    read_rows,
    verify,
)
from cache.encoding import ShardTask, SupersededRunError, encode_shards
from cache.location import Location, locate
from gill_errors import GillError, WriteFailedError
from gill_progress import Ticker


class Killed(BaseException):
    pass


def expect_values(path: str | Path, rows: list[str]) -> None:
    """Every row of the store is done and holds what the encoder gives for it, as float16."""
    stored = read_rows(path, range(len(rows)))
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(stored["embedding"][i], value(row).astype(np.float16))
        np.testing.assert_array_equal(stored["pooled"][i], value(row)[-1])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 16, 19])
def test_any_number_of_rows(tmp_path: Path, count: int) -> None:
    path, rows = tmp_path / "s.zarr", captions(count)
    report = fill_sample(path, rows)
    assert (report.done, report.encoded, report.failed) == (count, count, {})
    expect_values(path, rows)
    np.testing.assert_array_equal(open_store(path).constant("empty_embedding"), value(""))
    assert read_manifest(path)["num_rows"] == count
    assert verify(path).ok
    again = fill_sample(path, rows)
    assert (again.encoded, again.skipped) == (0, count)


def test_plain_zarr_and_xarray_read_a_store(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", captions(19)
    fill_sample(path, rows)
    want = np.stack([value(row) for row in rows]).astype(np.float16)
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(group["embedding"][:], want)
    with xarray.open_zarr(path, consolidated=False) as dataset:
        assert dataset["embedding"].dims == ("row", "position", "channel")
        assert dataset["empty_embedding"].dims == ("position", "channel")
        assert dataset["row_status"].dims == ("row",)
        np.testing.assert_array_equal(dataset["embedding"].values, want)
        np.testing.assert_array_equal(dataset["pooled"].isel(row=3).values, value(rows[3])[-1])


def test_a_small_store_can_be_decoded_by_hand(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", captions(19)
    fill_sample(path, rows, spec=make_spec(dtype="int8", share_first=True))
    with xarray.open_zarr(path, consolidated=False) as store:
        assert store["embedding"].dims == ("row", "position_after_first", "channel")
        rest = store["embedding"] * store["embedding_scale"] + store["embedding_offset"]
        first = store["embedding_first"].values
    found = read_rows(path, range(19))["embedding"]
    np.testing.assert_allclose(found[:, 1:], rest.values, rtol=1e-6)
    np.testing.assert_array_equal(found[:, 0], np.broadcast_to(first, (19, 6)))
    np.testing.assert_array_equal(first, value(rows[0])[0])
    assert 0 < np.abs(found - np.stack([value(row) for row in rows])).max() < 0.03


def test_a_row_that_fails_for_want_of_memory_is_no_failed_row(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", captions(19)

    def read_a_large_one(row: str) -> str:
        if row == rows[12]:
            raise MemoryError
        return row

    def fill_with(read_row: Callable[[str], str]) -> FillReport:
        roles = Roles(read_row, encode, constants=empty_prompt)
        return fill(path, rows, make_spec(), lambda: roles, provenance=PROVENANCE)

    with pytest.raises(GillError, match=r"not enough memory to read row 12 of .*run.readers"):
        fill_with(read_a_large_one)
    report = fill_with(lambda row: row)
    assert (report.done, report.encoded, report.failed) == (19, 11, {}), "the first shard stays"
    expect_values(path, rows)


def test_an_unreadable_row_is_recorded_and_can_be_retried(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", captions(19)
    rows[4], rows[17] = "unreadable four", "unreadable é" + "x" * 300
    report = fill_sample(path, rows)
    assert report.failed[4] == "OSError: cannot open unreadable four"
    assert report.failed[17].startswith("OSError: cannot open unreadable é")
    assert report.done == 17
    assert read_manifest(path)["status"] == {"pending": 0, "done": 17, "failed": 2}
    assert fill_sample(path, rows).encoded == 0
    before = files(path)
    repaired = fill(
        path,
        rows,
        make_spec(),
        lambda: Roles(lambda row: row, encode),
        provenance=PROVENANCE,
        retry_failed=True,
    )
    assert (repaired.encoded, repaired.failed) == (2, {})
    expect_values(path, rows)
    after = files(path)
    assert before["embedding/c/1/0/0"] == after["embedding/c/1/0/0"]  # rows 8 to 15: untouched
    assert not np.asarray(zarr.open_group(path, mode="r")["row_reason"]).any()


def test_only_new_rows_are_encoded(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, captions(13))
    log = tmp_path / "log"
    log.mkdir()
    report = fill_sample(path, captions(30), log=log)
    assert (report.encoded, report.skipped) == (17, 13)
    assert report.notes == ["17 rows are new at the end of the table"]
    assert (log / str(os.getpid())).read_text().split("\n")[:-1] == captions(30)[13:]
    expect_values(path, captions(30))
    fresh = tmp_path / "fresh.zarr"
    fill_sample(fresh, captions(30))
    assert {k: v for k, v in files(path).items() if "/c/" in k} == {
        k: v for k, v in files(fresh).items() if "/c/" in k
    }


def test_changed_and_dropped_rows(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", captions(30)
    fill_sample(path, rows)
    rows[5] = "another five"
    report = fill_sample(path, rows)
    assert (report.encoded, report.skipped) == (1, 29)
    assert "row 5 is not what was stored there (from row 5 on)" in report.notes[0]
    assert "29 stored rows are kept" in report.notes[0]
    expect_values(path, rows)

    shorter = fill_sample(path, rows[:11])
    assert (shorter.encoded, shorter.num_rows) == (0, 11)
    # What was cut off must not come back as done when the table grows again.
    longer = [*rows[:11], *(f"later {i}" for i in range(10))]
    assert fill_sample(path, longer).encoded == 10
    expect_values(path, longer)

    shifted = ["first", *longer]
    report = fill_sample(path, shifted)
    assert report.encoded == len(shifted)
    assert "no stored row can be kept" in report.notes[0]
    expect_values(path, shifted)


def test_another_model_is_refused_by_name_and_rebuilt_on_purpose(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", captions(9)
    fill_sample(path, rows)
    before = files(path)
    changed = {**PROVENANCE, "preprocessing": {"size": 16}}
    with pytest.raises(StoreMismatchError, match=r"provenance.preprocessing.size: stored 8, asked"):
        fill_sample(path, rows, provenance=changed)
    with pytest.raises(
        StoreMismatchError, match=r"embedding.codec.dtype: stored 'float16', asked 'int8'"
    ):
        fill_sample(path, rows, spec=make_spec(dtype="int8"))
    assert files(path) == before
    report = fill_sample(path, rows, provenance=changed, rebuild=True)
    assert report.encoded == 9
    assert open_store(path).provenance == changed
    expect_values(path, rows)


def test_a_removal_that_is_killed_leaves_no_row_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, spec = captions(9), make_spec(dtype="int8", share_first=True)
    fresh = tmp_path / "fresh.zarr"
    fill_sample(fresh, rows, spec=spec)
    remove, countdown = Location.remove, [0]

    def remove_until(self: Location, *inside: str) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed
        remove(self, *inside)

    for k in range(1, 20):
        path = tmp_path / f"{k}.zarr"
        fill_sample(path, rows, spec=spec)
        countdown[0] = k
        monkeypatch.setattr(Location, "remove", remove_until)
        try:
            fill_sample(path, rows, spec=spec, rebuild=True)
            break
        except Killed:
            monkeypatch.setattr(Location, "remove", remove)
        assert fill_sample(path, rows, spec=spec).encoded in (0, 9)
        expect_same = {name: data for name, data in files(fresh).items() if name != "zarr.json"}
        assert {n: d for n, d in files(path).items() if n != "zarr.json"} == expect_same
    assert k > 10


def test_other_library_versions_are_recorded_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, captions(3), versions={"torch": "1"})
    fill_sample(path, captions(5), versions={"torch": "2"})
    assert [v["torch"] for v in open_store(path).meta["versions"]] == ["1", "2"]


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for rebuild in (False, True):
        with pytest.raises(NotAStoreError):
            fill_sample(tmp_path, captions(3), rebuild=rebuild)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_batches_hold_items_of_one_group(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    rows = ["x" * (1 + i * 7 % 4) + str(i) for i in range(26)]
    batches = []

    def encode_and_note(payloads: list[str]) -> dict[str, np.ndarray]:
        batches.append(payloads)
        return encode(payloads)

    roles = Roles(read, encode_and_note, group=len, constants=empty_prompt)
    params = FillingParams(batch_size=3)
    fill(path, rows, make_spec(), lambda: roles, provenance=PROVENANCE, params=params)
    assert all(len(set(map(len, batch))) == 1 for batch in batches)
    assert max(map(len, batches)) == 3
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    expect_values(path, rows)


def test_reading_encoding_and_writing_overlap(tmp_path: Path) -> None:
    """A reader waits for the encoding of an earlier batch: it must not hold it up."""
    encoding = threading.Event()

    def read_late(row: str) -> str:
        if row == "caption 6":
            assert encoding.wait(10), "nothing was encoded while reading"
        return row

    def encode_and_tell(payloads: list[str]) -> dict[str, np.ndarray]:
        encoding.set()
        return encode(payloads)

    roles = Roles(read_late, encode_and_tell, constants=empty_prompt)
    params = FillingParams(batch_size=3, num_readers=2)
    report = fill(
        tmp_path / "s.zarr",
        captions(9),
        make_spec(),
        lambda: roles,
        provenance=PROVENANCE,
        params=params,
    )
    assert report.done == 9


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, ...]] = []
    rows = captions(18)
    rows[2] = "unreadable"
    fill_sample(tmp_path / "s.zarr", rows, progress=lambda *counts: told.append(counts))
    assert told == [(8, 18, 1), (16, 18, 1), (18, 18, 1)]


def test_a_ticker_counts(capsys: pytest.CaptureFixture[str]) -> None:
    ticker = Ticker("features", interval=0)
    ticker._next, ticker._began = 0, time.monotonic() - 4
    ticker.count(1000, 4000, 1)
    ticker.count(0, 4000)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "features: 1,000 of 4,000 rows (25%), 250 rows/s, 12 s left, 1 failed"
    assert second == "features: 0 of 4,000 rows (0%), 0 rows/s, no estimate yet"


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_encoder_that_raises_costs_only_its_shard(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    path, rows = tmp_path / "s.zarr", captions(30)

    def encode_until(payloads: list[str]) -> dict[str, np.ndarray]:
        if "caption 17" in payloads:
            raise kind("out of memory")
        return encode(payloads)

    roles = Roles(read, encode_until, constants=empty_prompt)
    params = FillingParams(batch_size=4)
    with pytest.raises(kind, match="out of memory") as caught:
        fill(path, rows, make_spec(), lambda: roles, provenance=PROVENANCE, params=params)
    if kind is RuntimeError:
        assert "rows 16 to 19" in caught.value.__notes__[0]
    assert not manifest_location(path).path.exists()
    status = open_store(path).status()
    assert (status[:16] == RowStatus.DONE).all()
    assert (status[16:] == RowStatus.PENDING).all()
    assert fill_sample(path, rows).encoded == 14
    expect_values(path, rows)


def test_wrong_shapes_and_values_from_the_encoder(tmp_path: Path) -> None:
    def misshapen(payloads: list[str]) -> dict[str, np.ndarray]:
        return {"embedding": np.zeros((len(payloads), 2)), "pooled": np.zeros((len(payloads), 6))}

    roles = Roles(read, misshapen, constants=empty_prompt)
    with pytest.raises(ValueError, match=r"'embedding' of shape \(3, 5, 6\), got \(3, 2\)"):
        fill(tmp_path / "a.zarr", captions(3), make_spec(), lambda: roles, provenance=PROVENANCE)

    def diverged(payloads: list[str]) -> dict[str, np.ndarray]:
        values = encode(payloads)
        values["embedding"][1, 2, 3] = np.nan
        return values

    roles = Roles(read, diverged, constants=empty_prompt)
    report = fill(
        tmp_path / "b.zarr", captions(3), make_spec(), lambda: roles, provenance=PROVENANCE
    )
    assert report.failed == {1: "embedding: the encoder gave a value that is not finite"}


# Faults that must cost nothing


def test_a_kill_before_any_file_is_renamed_costs_unfinished_shards_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file comes into place by a rename. Stop before the k-th, for every k, and go on."""
    rows = captions(9)
    rows[5] = "unreadable"
    fresh, spec = tmp_path / "fresh.zarr", make_spec(shard_rows=4)
    fill_sample(fresh, rows, spec=spec)
    rename, countdown = Path.replace, [0]

    def replace(self: Path, target: Path) -> Path:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed
        return rename(self, target)

    for k in range(1, 200):
        path = tmp_path / f"{k}.zarr"
        countdown[0] = k
        monkeypatch.setattr(Path, "replace", replace)
        try:
            fill_sample(path, rows, spec=spec)
            survived = True
        except Killed:
            survived = False
        monkeypatch.setattr(Path, "replace", rename)
        log = tmp_path / f"log{k}"
        log.mkdir()
        done: set[str] = set()
        if (path / "row_status/zarr.json").exists():
            store = open_store(path)
            done = {rows[i] for i in np.flatnonzero(store.status() == RowStatus.DONE)}
        report = fill_sample(path, rows, spec=spec, log=log)
        again = {name for file in log.iterdir() for name in file.read_text().split("\n")}
        assert not again & done
        assert report.done == 8
        assert files(path) == files(fresh)
        assert manifest_location(path).read_text() == manifest_location(fresh).read_text()
        if survived:
            break
    assert 20 < k < 200


@pytest.mark.parametrize("moment", ["writing", "encoding"])
def test_sigkill(tmp_path: Path, moment: str) -> None:
    """A process killed by SIGKILL: in the middle of writing a file, or wherever it is."""
    path, rows = tmp_path / "s.zarr", captions(40)
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_cache_samples import captions, fill_sample
whole = Path.replace
def half(part, target):
    if "/embedding/c/2/" in str(target) and {moment == "writing"}:  # the values of the third shard
        os.truncate(part, part.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(part, target)
Path.replace = half
show = lambda settled, total, failed: print(settled, flush=True)
fill_sample({str(path)!r}, captions(40), seconds=0.02, progress=show)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert child.stdout is not None
    if moment == "encoding":
        assert child.stdout.readline() == "8\n"
        assert child.stdout.readline() == "16\n"
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    done = int((open_store(path).status() == RowStatus.DONE).sum())
    assert done in ((16, 24) if moment == "encoding" else (8, 16))
    leftovers = list(path.rglob("*.partial"))
    assert leftovers or moment == "encoding"
    report = fill_sample(path, rows)  # the dead process does not hold the lock
    assert report.encoded == 40 - done
    assert not list(path.rglob("*.partial"))
    fresh = tmp_path / "fresh.zarr"
    fill_sample(fresh, rows)
    assert files(path) == files(fresh)


def test_two_runs_at_once(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", captions(20)
    running = threading.Event()
    first = threading.Thread(
        target=fill_sample,
        args=(path, rows),
        kwargs={"seconds": 0.05, "progress": lambda *_: running.set()},
    )
    first.start()
    assert running.wait(10)
    with pytest.raises(StoreLockedError, match=f"process {os.getpid()} on .* is at work"):
        fill_sample(path, rows)
    first.join()
    assert fill_sample(path, rows).encoded == 0
    expect_values(path, rows)


class FaultyFileSystem(MemoryFileSystem):
    """Objects in memory, until a write fails with an operating-system error."""

    protocol = "faulty"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    writes_left = 10**9
    fault = errno.ENOSPC

    def pipe_file(self, path: str, value: bytes, **kwargs: object) -> None:
        self._write()
        super().pipe_file(path, value, **kwargs)

    def open(self, path: str, mode: str = "rb", **kwargs: object) -> object:
        if mode != "rb":
            self._write()
        return super().open(path, mode, **kwargs)

    def _write(self) -> None:
        if FaultyFileSystem.writes_left <= 0:
            raise OSError(FaultyFileSystem.fault, os.strerror(FaultyFileSystem.fault))
        FaultyFileSystem.writes_left -= 1


def test_a_full_disk_stops_the_run_and_costs_nothing() -> None:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    path, rows = "faulty://disk/s.zarr", captions(24)
    FaultyFileSystem.fault = errno.ENOSPC
    counts, errors = [], []
    for room in range(0, 100, 7):
        FaultyFileSystem.writes_left = room
        try:
            report = fill_sample(path, rows)
            break
        except WriteFailedError as e:
            errors.append(e)
        FaultyFileSystem.writes_left = 10**9
        if locate(f"{path}/row_status/zarr.json").exists():
            counts.append(open_store(path).status_counts()["done"])
    FaultyFileSystem.writes_left = 10**9
    assert {e.errno for e in errors} == {errno.ENOSPC}
    assert all("No space left" in str(e) and "run again" in str(e) for e in errors)
    assert counts == sorted(counts)
    assert 0 in counts
    assert any(0 < count < 24 for count in counts)
    assert report.encoded == 24 - counts[-1]
    expect_values(path, rows)


@pytest.mark.skipif(
    os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounting needs root on Linux"
)
def test_a_full_local_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        path, rows = disk / "s.zarr", captions(200)
        with pytest.raises(WriteFailedError, match="No space left"):
            fill_sample(path, rows)
        done = int((open_store(path).status() == RowStatus.DONE).sum())
        assert 0 < done < 200
        assert not list(path.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert fill_sample(path, rows).encoded == 200 - done
        expect_values(path, rows)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_store_is_read_and_not_filled() -> None:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    path, rows = "faulty://sealed/s.zarr", captions(9)
    FaultyFileSystem.writes_left = 10**9
    fill_sample(path, rows)
    FaultyFileSystem.writes_left, FaultyFileSystem.fault = 0, errno.EROFS
    expect_values(path, rows)
    assert verify(path).ok
    with pytest.raises(WriteFailedError, match="Read-only"):
        fill_sample(path, captions(10))
    FaultyFileSystem.writes_left = 10**9


def test_reading_and_verifying_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, captions(9))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    expect_values(path, captions(9))
    assert verify(path).ok
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_run_that_is_over_writes_no_shard(tmp_path: Path) -> None:
    """A worker that outlives its coordinator must not write into a store that another run holds."""
    path, rows = tmp_path / "s.zarr", captions(8)
    fill_sample(path, rows)
    before = files(path)
    task = ShardTask(0, ["other"] * 8, np.ones(8, bool), np.zeros(8, bool), {})
    late = encode_shards(
        open_store(path), "an earlier run", [task], make_roles(), batch_size=8, num_readers=1
    )
    with pytest.raises(SupersededRunError):
        next(late)
    assert files(path) == before


def test_the_manifest_says_what_is_in_the_store(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.zarr", captions(19)
    fill_sample(path, rows)
    where = manifest_location(path)
    text = where.read_text()
    assert text is not None
    manifest = json.loads(text)
    assert manifest["provenance"] == PROVENANCE
    assert len(manifest["shards"]["embedding"]) == 3
    error = manifest["measured"]["embedding"]
    assert 0 < error["relative_squared_error_mean"] < error["relative_squared_error_max"] < 2.0**-22
    stamp = where.path.stat().st_mtime_ns
    time.sleep(0.01)
    fill_sample(path, rows)
    assert where.path.stat().st_mtime_ns == stamp  # nothing to do: DVC sees nothing new
    rows[1] = "changed"
    fill_sample(path, rows)
    changed = read_manifest(path)
    assert changed["content"] != manifest["content"]
    assert changed["shards"]["embedding"][1:] == manifest["shards"]["embedding"][1:]
    assert changed["shards"]["embedding"][0] != manifest["shards"]["embedding"][0]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(handle: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        events.append(f"{kind} of {os.fstat(handle).st_size if kind == 'file' else 'names'} synced")
        fsync(handle)

    def logged_replace(path: Path, target: Path) -> Path:
        events.append("named")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    locate(tmp_path / "s.zarr").write_bytes([b"ab", b"c"], "embedding", "c", "0")
    assert events == ["file of 3 synced", "named", "folder of names synced"]
    assert (tmp_path / "s.zarr/embedding/c/0").read_bytes() == b"abc"
