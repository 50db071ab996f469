"""Stores on a server that is slow, fails at random, or outlives the process that writes to it."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
from test_cache_samples import captions, fill_sample, value

from cache import (
    ArraySpec,
    Codec,
    DamagedRowsError,
    ReadingParams,
    ShuffledRows,
    StoreSpec,
    StoreUnreachableError,
    open_store,
    read_manifest,
    read_rows,
    verify,
)
from cache.shards import max_shard_bytes

SPEC = StoreSpec(
    arrays={"pooled": ArraySpec(dims={"channel": 6}, codec=Codec(dtype="float32"))}, shard_rows=4
)
HERE = Path(__file__).parent
StartServer = Callable[..., Path]


@pytest.fixture
def start_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartServer]:
    """Start `object_server.py` with the bucket `corpus`; gives its folder."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    running = []

    def start(delay: float = 0.0, failures: float = 0.0) -> Path:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        command = [sys.executable, str(HERE / "object_server.py"), str(tmp_path)]
        running.append(subprocess.Popen([*command, str(delay), str(failures)]))
        deadline = time.monotonic() + 60
        while not (tmp_path / "port").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        port = (tmp_path / "port").read_text()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()  # of another test's server
        fsspec.filesystem("s3").mkdir("corpus")
        return tmp_path

    yield start
    for process in running:
        process.kill()
        process.wait()


def requests(folder: Path, method: str, part: str) -> list[tuple[str, str]]:
    """(key, outcome) of every request for keys with `part` in them."""
    lines = [line.split() for line in (folder / "requests").read_text().splitlines()]
    return [(key, outcome) for how, key, outcome in lines if how == method and part in key]


def expected(rows: list[str]) -> np.ndarray:
    return np.stack([value(row)[-1] for row in rows])


def bytes_in(folder: Path) -> int:
    """What files take, but for those that go meanwhile."""
    total = 0
    for path in folder.glob("*.*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("compressor", ["none", "blosc-zstd"])
def test_an_epoch_through_a_small_disk_gets_every_object_once(
    start_server: StartServer, compressor: str
) -> None:
    folder = start_server()
    pooled = ArraySpec(dims={"channel": 6}, codec=Codec(dtype="float32", compressor=compressor))
    spec = StoreSpec(arrays={"pooled": pooled}, shard_rows=4)
    path, rows, shard = "s3://corpus/s.zarr", captions(40), max_shard_bytes(spec, "pooled")
    fill_sample(path, rows, spec=spec)
    largest = max(fsspec.filesystem("s3").du("corpus/s.zarr/pooled/c", total=False).values())
    assert largest <= shard
    params = ReadingParams(
        block_rows=4, buffer_rows=4, cache_limit=4 * shard, cache_folder=str(folder / "copies")
    )
    before = requests(folder, "HEAD", "")
    seen = {}
    for batch in ShuffledRows({"x": (path, "pooled")}, batch_size=8, seed=0, params=params):
        seen.update(zip(batch.rows.tolist(), batch.arrays["x"]))
        assert bytes_in(folder / "copies") <= 6 * shard
    np.testing.assert_array_equal(np.stack([seen[row] for row in range(40)]), expected(rows))
    got = Counter(key for key, _ in requests(folder, "GET", "/pooled/c/"))
    assert len(got) == 10
    assert requests(folder, "HEAD", "") == before, "sizes were asked for"
    assert set(got.values()) == {1}


def test_a_server_that_fails_at_random(start_server: StartServer) -> None:
    folder = start_server(failures=0.25)
    path, rows = "s3://corpus/s.zarr", captions(8)
    assert fill_sample(path, rows, spec=SPEC).done == 8
    np.testing.assert_array_equal(read_rows(path, range(8))["pooled"], expected(rows))
    params = ReadingParams(cache_limit=2**20, cache_folder=str(folder / "copies"))
    for batch in ShuffledRows({"x": (path, "pooled")}, batch_size=8, seed=0, params=params):
        want = expected([rows[row] for row in batch.rows])
        np.testing.assert_array_equal(batch.arrays["x"], want)
    assert verify(path).ok
    outcomes = Counter(outcome for _, outcome in requests(folder, "GET", "/s.zarr/"))
    outcomes += Counter(outcome for _, outcome in requests(folder, "PUT", "/s.zarr/"))
    assert {"503", "dropped", "half"} <= set(outcomes)


def test_a_damaged_object_is_named(start_server: StartServer) -> None:
    start_server()
    path, rows = "s3://corpus/s.zarr", captions(12)
    fill_sample(path, rows, spec=SPEC)
    fs, shard = fsspec.filesystem("s3"), "corpus/s.zarr/pooled/c/1/0"
    content = fs.cat_file(shard)
    for damaged in (bytes([content[0] ^ 1]) + content[1:], content[:-5], None):
        fs.rm_file(shard)
        if damaged is not None:
            fs.pipe_file(shard, damaged)
        with pytest.raises(DamagedRowsError, match=rf"^s3://{shard} \(shard 1\): row 4.*$"):
            read_rows(path, range(12))


def test_a_server_that_is_gone_is_no_damage(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_server()
    path = "s3://corpus/s.zarr"
    fill_sample(path, captions(8), spec=SPEC)
    store = open_store(path)
    store.read_stored("pooled", 0, 2)
    fs = fsspec.filesystem("s3")

    async def fail(*args: object, **options: object) -> bytes:
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(fs), "_cat_file", fail)
    with pytest.raises(StoreUnreachableError, match=r"^s3://corpus/s.zarr/row_status cannot be"):
        verify(store)
    with pytest.raises(StoreUnreachableError, match=r"s.zarr/pooled/c/1/0 cannot be read"):
        store.read_stored("pooled", 4, 6)
    with pytest.raises(StoreUnreachableError, match=r"^s3://corpus/s.zarr cannot be read"):
        open_store(path)


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_cache_samples import captions, fill_sample
from test_remote_stores import SPEC
fill_sample("s3://corpus/s.zarr", captions(24), spec=SPEC, seconds=0.02)
"""


def test_a_killed_writer_leaves_whole_shards_and_no_lock(start_server: StartServer) -> None:
    folder = start_server(delay=0.0)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(HERE)])
    while len(requests(folder, "PUT", "/pooled/c/")) < 3:
        assert writer.poll() is None
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    rows, path = captions(24), "s3://corpus/s.zarr"
    done = np.flatnonzero(open_store(path).status() == 1)
    assert 0 < len(done) < 24
    np.testing.assert_array_equal(
        read_rows(path, done)["pooled"], expected([rows[row] for row in done])
    )
    report = fill_sample(path, rows, spec=SPEC)
    assert (report.done, report.skipped) == (24, len(done))
    assert verify(path).ok
    fill_sample("s3://corpus/undisturbed.zarr", rows, spec=SPEC)
    content = read_manifest("s3://corpus/undisturbed.zarr")["content"]
    assert read_manifest(path)["content"] == content
    assert not fsspec.filesystem("s3").exists("corpus/s.lock")
