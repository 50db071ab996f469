"""Other ways to keep and read the same rows, those of them that are installed (extra `peers`).

Each writes values [N, ...] float16 into a folder, and reads an epoch of shuffled batches into
memory, as its documentation shows for one process. tensorstore and zarrs read our own store: they
neither shuffle nor check.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Bench, Numbers, Unavailable
from cache import open_store

BATCH = 200


class Peer(NamedTuple):
    """How a library is tried: what to import, to write with, and to read an epoch with, which
    yields how many rows at a time. Without `write` it reads our store."""

    library: str
    write: Callable[[Path, np.ndarray], None] | None
    epoch: Callable[[Path, int], Iterator[int]]

    def check_installed(self) -> None:
        """Raises Unavailable naming the library that lacks."""
        try:
            importlib.import_module(self.library)
        except ImportError as error:
            raise Unavailable(f"{self.library} is not installed: {error}") from error


def beside_peers(
    bench: Bench, store: Path, warm: Callable[[], Iterator[int]], cold: Callable[[], Iterator[int]]
) -> None:
    """An epoch of every peer in turn with ours of `store`: `warm`, and `cold` by a new reader."""
    values = open_store(store).read_stored("embedding", 0, open_store(store).num_rows)
    pairs = bench.size(1, 3 if bench.quick else 7, 7)
    row_bytes = values[0].nbytes
    drained = lambda: (count / row_bytes for count in sequential(store))  # noqa: E731
    bench.part("disk, in sequence, cold", partial(_pairs, bench, pairs, cold, drained, (store,)))
    for name, peer in PEERS.items():
        place = store if peer.write is None else store.parent / peer.library

        def prepared(peer: Peer = peer, place: Path = place) -> Numbers:
            peer.check_installed()
            if peer.write is not None:
                place.mkdir()
                peer.write(place, values)
            return _pairs(bench, pairs, warm, partial(peer.epoch, place, BATCH), ())

        bench.part(name, prepared)
        if "rows_per_s" in bench.results[name]:
            theirs = partial(peer.epoch, place, BATCH)
            part = partial(_pairs, bench, pairs, cold, theirs, (store, place))
            bench.part(f"{name}, cold", part)
        if peer.write is not None:
            shutil.rmtree(place, ignore_errors=True)


def _pairs(
    bench: Bench,
    pairs: int,
    ours: Callable[[], Iterator[float]],
    theirs: Callable[[], Iterator[float]],
    forgotten: Iterable[Path],
) -> Numbers:
    """Medians of both and of their ratios; the first pair warms up, unless files are forgotten."""
    speeds = []
    for _ in range(pairs if forgotten else pairs + 1):
        pair = []
        for epoch in (ours, theirs):
            for folder in forgotten:
                forget(folder)
            rows: list[float] = []
            seconds = bench.once(lambda: rows.extend(epoch()))  # noqa: B023
            pair.append(sum(rows) / seconds)
        speeds.append(pair)
    speeds = speeds[-pairs:]
    ratio = median(one / other for one, other in speeds)
    ours_speed, speed = (median(side) for side in zip(*speeds))
    return {"rows_per_s": speed, "ours_rows_per_s": ours_speed, "ours_vs_this": ratio}


def forget(folder: Path) -> None:
    """Have the system drop a folder's files from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # what is not on the disk yet would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential(folder: Path) -> Iterator[int]:
    """A folder's files, one after the other, in pieces of 8 MB: bytes."""
    piece = bytearray(8 << 20)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(piece):
                    yield count


def _write_litdata(folder: Path, values: np.ndarray) -> None:
    cache = importlib.import_module("litdata.streaming.cache").Cache(
        str(folder), chunk_bytes="64MB"
    )
    for i, value in enumerate(values):
        cache[i] = value
    cache.done()
    cache.merge()


def _read_litdata(folder: Path, batch: int) -> Iterator[int]:
    litdata = importlib.import_module("litdata")
    # In shuffled order, decoding whole stretches ("auto") decodes every row some fifty times.
    rows = litdata.StreamingDataset(str(folder), shuffle=True, batch_decode=False)
    for found in litdata.StreamingDataLoader(rows, batch_size=batch, num_workers=0):
        yield len(found)


def _write_streaming(folder: Path, values: np.ndarray) -> None:
    shape = ",".join(map(str, values.shape[1:]))
    writer = importlib.import_module("streaming").MDSWriter
    with writer(out=str(folder), columns={"x": f"ndarray:float16:{shape}"}) as out:
        for value in values:
            out.write({"x": value})


def _read_streaming(folder: Path, batch: int) -> Iterator[int]:
    from torch.utils.data import DataLoader

    dataset = importlib.import_module("streaming").StreamingDataset
    rows = dataset(local=str(folder), shuffle=True, batch_size=batch)
    for found in DataLoader(rows, batch_size=batch):
        yield len(found["x"])


def _write_webdataset(folder: Path, values: np.ndarray) -> None:
    writer = importlib.import_module("webdataset").ShardWriter
    with writer(str(folder / "%05d.tar"), maxcount=1024, verbose=0) as out:
        for i, value in enumerate(values):
            out.write({"__key__": f"{i:08}", "x.npy": value})


def _read_webdataset(folder: Path, batch: int) -> Iterator[int]:
    dataset = importlib.import_module("webdataset").WebDataset
    shards = sorted(map(str, folder.glob("*.tar")))
    rows = dataset(shards, shardshuffle=len(shards), empty_check=False)
    for (found,) in rows.shuffle(1000).decode().to_tuple("x.npy").batched(batch):
        yield len(found)


def _table(values: np.ndarray) -> Any:
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(flat, values[0].size)})


def _write_datasets(folder: Path, values: np.ndarray) -> None:
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset(_table(values)).save_to_disk(str(folder))


def _read_datasets(folder: Path, batch: int) -> Iterator[int]:
    rows = importlib.import_module("datasets").load_from_disk(str(folder)).with_format("numpy")
    order = np.random.default_rng(0).permutation(len(rows))
    for start in range(0, len(order), batch):
        yield len(rows[order[start : start + batch]]["x"])


def _write_lance(folder: Path, values: np.ndarray) -> None:
    importlib.import_module("lance").write_dataset(_table(values), str(folder / "rows.lance"))


def _read_lance(folder: Path, batch: int) -> Iterator[int]:
    rows = importlib.import_module("lance").dataset(str(folder / "rows.lance"))
    order = np.random.default_rng(0).permutation(rows.count_rows())
    for start in range(0, len(order), batch):
        found = rows.take(order[start : start + batch].tolist())["x"].combine_chunks()
        yield len(np.asarray(found.flatten()).reshape(len(found), -1))


def _read_tensorstore(folder: Path, batch: int) -> Iterator[int]:
    place = {"driver": "file", "path": str(folder / "embedding")}
    spec = {"driver": "zarr3", "kvstore": place}
    array = importlib.import_module("tensorstore").open(spec).result()
    num_rows = array.shape[0]
    for start in range(0, num_rows, 128):
        yield len(array[start : min(start + 128, num_rows)].read().result())


def _read_zarrs(folder: Path, batch: int) -> Iterator[int]:
    import zarr

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array: Any = zarr.open_group(folder, mode="r")["embedding"]
        rows = array.shards[0]
        for start in range(0, array.shape[0], rows):
            yield len(array[start : start + rows])


PEERS = {
    "litdata": Peer("litdata", _write_litdata, _read_litdata),
    "mosaicml-streaming": Peer("streaming", _write_streaming, _read_streaming),
    "webdataset": Peer("webdataset", _write_webdataset, _read_webdataset),
    "datasets, numpy": Peer("datasets", _write_datasets, _read_datasets),
    "Lance, take": Peer("lance", _write_lance, _read_lance),
    "tensorstore, blocks of 128": Peer("tensorstore", None, _read_tensorstore),
    "zarrs, whole shards": Peer("zarrs", None, _read_zarrs),
}
