"""A store's rows in the formats of others: Parquet, NumPy files, WebDataset shards."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.location import Location
from cache.reading import Batch, iterate_blocks
from cache.store import EmbeddingStore, RowStatus, open_store
from gill_errors import InputError
from gill_files import explained


def export_store(where: str | Path | Location, target: Path, to: str) -> int:
    """Write the rows of a store that are done, decoded and checked; gives how many there are.

    to: `parquet`, one file: `row` int64, and a column of fixed-shape tensors per array; `npy`, a
    folder: row.npy int64 [n], and ARRAY.npy [n, *shape] for each array and CONSTANT.npy;
    `webdataset`, a folder of tar shards, a sample per row: ROW.ARRAY.npy. Whole or not at all.

    Raises InputError for another format or where something lies at `target`, DamagedRowsError.
    """
    if to not in FORMATS:
        raise InputError(f"a store cannot be exported to {to!r}, only to {', '.join(FORMATS)}")
    if target.exists():
        raise InputError(f"{target} is there: name another path, or remove it")
    store = open_store(where)
    part = target.with_name(f".{target.name}.part")
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Left by an export that was killed.
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        FORMATS[to](store, iterate_blocks(store, block_rows=store.spec.shard_rows), part)
        part.rename(target)
    return store.status_counts()["done"]


def _to_parquet(store: EmbeddingStore, blocks: Iterator[Batch], file: Path) -> None:
    types = {name: _decoded_dtype(store, name) for name in store.spec.arrays}
    tensors = {
        name: pa.fixed_shape_tensor(pa.from_numpy_dtype(types[name]), array.shape)
        for name, array in store.spec.arrays.items()
    }
    with pq.ParquetWriter(file, pa.schema({"row": pa.int64(), **tensors})) as writer:
        for rows, arrays in blocks:
            columns = {
                name: pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
                for name, values in arrays.items()
            }
            writer.write_table(pa.table({"row": rows, **columns}))


def _to_npy(store: EmbeddingStore, blocks: Iterator[Batch], folder: Path) -> None:
    folder.mkdir()
    done = np.flatnonzero(store.status() == RowStatus.DONE)
    np.save(folder / "row.npy", done)
    for name in store.spec.constants:
        np.save(folder / f"{name}.npy", store.constant(name))
    files = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", _decoded_dtype(store, name), (len(done), *array.shape)
        )
        for name, array in store.spec.arrays.items()
    }
    start = 0
    for rows, arrays in blocks:
        for name, values in arrays.items():
            files[name][start : start + len(rows)] = values
        start += len(rows)
    for file in files.values():
        file.flush()


def _to_webdataset(store: EmbeddingStore, blocks: Iterator[Batch], folder: Path) -> None:
    folder.mkdir()
    for number, (rows, arrays) in enumerate(blocks):
        with tarfile.open(folder / f"{number:05}.tar", "w") as shard:
            for i, row in enumerate(rows.tolist()):
                for name, values in arrays.items():
                    content = io.BytesIO()
                    np.save(content, values[i])
                    member = tarfile.TarInfo(f"{row:09}.{name}.npy")
                    member.size = content.tell()
                    content.seek(0)
                    shard.addfile(member, content)


def _decoded_dtype(store: EmbeddingStore, name: str) -> np.dtype:
    return store.fitted(name).decoded_dtype


FORMATS = {"parquet": _to_parquet, "npy": _to_npy, "webdataset": _to_webdataset}
