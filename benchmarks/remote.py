"""An epoch over a store on a slow server, through copies a quarter of its size.

The server of the tests, each request waiting 50 ms; on a line of 1 Gbit/s, and without a limit,
where server and reader share this machine's processor. Beside the epoch, by turns: the same objects
by as many parallel plain requests. `ratio` is the epoch's bandwidth to theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec
import numpy as np

from benchmarks.harness import Bench, Numbers, Unavailable, in_new_process, run
from cache import ArraySpec, Codec, ReadingParams, Roles, ShuffledRows, StoreSpec, fill
from cache.fetch_ahead import FETCHES

SERVER = Path(__file__).parents[1] / "tests" / "object_server.py"
DELAY = 0.05  # seconds before each request is served
GIGABIT = 125e6  # bytes a second
PATH = "s3://corpus/s.zarr"


def measure(bench: Bench) -> None:
    num_shards, shard_rows = bench.size((8, 8), (64, 32), (512, 128))
    for name, rate in (("epoch", None), ("epoch, 1 Gbit/s", GIGABIT)):
        with tempfile.TemporaryDirectory() as folder:
            given = Path(folder), rate, num_shards, shard_rows, bench.toy
            bench.part(name, partial(in_new_process, epoch, *given))


def epoch(folder: Path, rate: float | None, num_shards: int, shard_rows: int, toy: bool) -> Numbers:
    """Bytes a second of an epoch and of plain requests, of a server that sends at most `rate`."""
    try:
        import moto.server
        import s3fs
    except ImportError as error:
        raise Unavailable(str(error)) from None
    del moto
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    limit = [] if rate is None else [str(rate)]
    server = subprocess.Popen([sys.executable, str(SERVER), str(folder), str(DELAY), "0", *limit])
    try:
        while not (folder / "port").exists():
            time.sleep(0.05)
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{(folder / 'port').read_text()}"
        s3fs.S3FileSystem.clear_instance_cache()
        fs = fsspec.filesystem("s3")
        fs.mkdir("corpus")
        rows = np.random.default_rng(0).normal(size=(shard_rows, 77, 768)).astype(np.float16)
        spec = StoreSpec(
            arrays={"x": ArraySpec(dims={"position": 77, "channel": 768}, codec=Codec())},
            shard_rows=shard_rows,
        )
        roles = Roles(read=int, encode=lambda batch: {"x": rows[np.array(batch) % shard_rows]})
        fill(PATH, range(num_shards * shard_rows), spec, lambda: roles, provenance={})
        nbytes = num_shards * shard_rows * rows[0].nbytes
        ratios, ours, plain = [], 0.0, 0.0
        for turn in range(1 if toy else 3):
            ours = nbytes / read_epoch(folder / f"copies-{turn}", nbytes // 4, shard_rows)
            plain = nbytes / get_plainly(fs)
            ratios.append(ours / plain)
        log = (folder / "requests").read_text().splitlines()
        gets = [line for line in log if line.startswith("GET") and "/x/c/" in line]
        return {
            "shards": num_shards,
            "MB/s": ours / 1e6,
            "plain MB/s": plain / 1e6,
            "ratio": float(np.median(ratios)),
            "fetches_per_shard": len(gets) / len(ratios) / num_shards - 1,
        }
    finally:
        server.kill()
        server.wait()


def read_epoch(copies: Path, limit: int, shard_rows: int) -> float:
    """Seconds of one epoch from empty copies."""
    params = ReadingParams(
        block_rows=shard_rows,
        buffer_rows=shard_rows,
        cache_limit=limit,
        cache_folder=str(copies),
    )
    rows = ShuffledRows({"x": (PATH, "x")}, batch_size=shard_rows, seed=0, params=params)
    began = time.perf_counter()
    for _ in rows:
        pass
    return time.perf_counter() - began


def get_plainly(fs: fsspec.AbstractFileSystem) -> float:
    """Seconds that the objects take by parallel requests, to memory."""
    keys = fs.find("corpus/s.zarr/x/c")
    began = time.perf_counter()
    with ThreadPoolExecutor(FETCHES) as pool:
        for _ in pool.map(fs.cat_file, keys):
            pass
    return time.perf_counter() - began


if __name__ == "__main__":
    run(measure, __doc__, wall=True)
