"""Stores behind fsspec URLs: objects in memory, and a local server that speaks S3."""

import os
import uuid

import fsspec
import numpy as np
import pytest
import zarr
from test_cache_samples import captions, fill_sample, make_spec, value

from cache import (
    ArraySpec,
    Codec,
    ShuffledRows,
    StoreLockedError,
    StoreSpec,
    describe,
    open_store,
    read_manifest,
    read_rows,
    repair,
    verify,
)
from cache.location import locate
from cache.lock import run_lock


def live_through_everything(path: str) -> None:
    """Fill, resume, extend, read, shuffle, damage, verify, repair, rebuild."""
    rows = captions(21)
    rows[6] = "unreadable"
    assert fill_sample(path, rows).done == 20
    assert fill_sample(path, rows).encoded == 0
    rows += ["one", "two", "three"]
    assert fill_sample(path, rows).encoded == 3
    good = [i for i in range(24) if i != 6]
    want = np.stack([value(rows[i]) for i in good]).astype(np.float16)
    np.testing.assert_array_equal(read_rows(path, good)["embedding"], want)
    seen = []
    for batch in ShuffledRows({"embedding": (path, "embedding")}, batch_size=5, seed=0):
        for row, found in zip(batch.rows, batch.arrays["embedding"]):
            np.testing.assert_array_equal(found, value(rows[row]).astype(np.float16))
            seen.append(row)
    assert sorted(seen) == good
    plain = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(np.asarray(plain["embedding"])[good], want)

    shard = f"{path}/embedding/c/1/0/0"
    with fsspec.open(shard, "rb") as f:
        content = bytearray(f.read())
    content[5] ^= 1
    with fsspec.open(shard, "wb") as f:
        f.write(bytes(content))
    report = repair(path)
    assert [(bad.file, list(bad.rows)) for bad in report.bad_shards] == [(shard, [8])]
    assert fill_sample(path, rows).encoded == 1
    assert verify(path).ok
    assert read_manifest(path)["status"] == {"pending": 0, "done": 23, "failed": 1}
    assert describe(path).arrays[0].num_files == 3

    fill_sample(path, rows[:4], spec=make_spec(shard_rows=2), rebuild=True)
    assert describe(path).arrays[0].num_files == 2


def test_memory() -> None:
    live_through_everything(f"memory://{uuid.uuid4().hex}/s.zarr")


def test_the_lock_of_an_object_store() -> None:
    path = f"memory://{uuid.uuid4().hex}/s.zarr"
    location = locate(path)
    with run_lock(location), pytest.raises(StoreLockedError, match="remove memory://.*lock"):
        fill_sample(path, captions(3))
    lock = location.beside(".lock")
    host = os.uname().nodename
    # A process that is gone, or whose number now belongs to a younger process, holds nothing.
    lock.write_text(f'{{"host": "{host}", "pid": {os.getpid()}, "started": 1.0, "run": "x"}}')
    assert fill_sample(path, captions(3)).done == 3
    lock.write_text('{"host": "elsewhere", "pid": 1, "started": 1.0, "run": "x"}')
    with pytest.raises(StoreLockedError, match="process 1 on elsewhere"):
        fill_sample(path, captions(3))
    assert open_store(path).num_rows == 3
    lock.remove()
    with run_lock(location):  # who takes over a lock that seems dead keeps it
        lock.write_text('{"host": "elsewhere", "pid": 1, "started": 1.0, "run": "x"}')
    assert "elsewhere" in (lock.read_text() or "")


def test_s3(bucket: str) -> None:
    path, rows = f"{bucket}/s.zarr", captions(5)
    spec = StoreSpec(
        arrays={"pooled": ArraySpec(dims={"channel": 6}, codec=Codec(dtype="float32"))},
        shard_rows=2,
    )
    assert fill_sample(path, rows[:3], spec=spec).done == 3
    assert fill_sample(path, rows, spec=spec).encoded == 2
    want = np.stack([value(row)[-1] for row in rows])
    np.testing.assert_array_equal(read_rows(path, range(5))["pooled"], want)
    np.testing.assert_array_equal(np.asarray(zarr.open_group(path, mode="r")["pooled"]), want)
    assert verify(path).ok
    assert read_manifest(path)["status"] == {"pending": 0, "done": 5, "failed": 0}
