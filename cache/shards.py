"""Shard files: written whole, and straight to and from memory where nothing is compressed.

Measured with zarr 3.1, on warm [77, 768] float16 rows: blocks of 128 come at 2 GB/s through Zarr's
own pipeline, at 5 GB/s through `zarrs`, and single rows, in any order, at 10 GB/s when the bytes
are read into place. A write through Zarr copies the shard several times, and first reads the one
that it replaces. The file format is simple enough to do without: inner chunks one after the other,
then an index of their places (offset, bytes), then the CRC-32C of the index.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Self, TypeAlias

import google_crc32c
import numpy as np
import zarr
from zarr.storage import MemoryStore

from cache.codec import zarr_compressors
from cache.layout import StoreSpec
from cache.location import Location
from gill_errors import InputError
from gill_files import explained

INDEX_ENTRY = np.dtype([("offset", "<u8"), ("nbytes", "<u8")])
NOT_STORED = 2**64 - 1  # an inner chunk of zeros has no bytes


Buffer: TypeAlias = bytes | memoryview


class DamagedShardError(InputError):
    """A shard file cannot be read as what it should be."""


def create_data_array(group: zarr.Group, name: str, spec: StoreSpec, num_rows: int) -> zarr.Array:
    """The Zarr array of `name` for `num_rows` rows: sharded by rows, with named dimensions."""
    array = spec.arrays[name]
    return group.create_array(
        name,
        shape=(num_rows, *array.stored_row_shape),
        chunks=(spec.inner_rows(name), *array.stored_row_shape),
        shards=(spec.shard_rows, *array.stored_row_shape),
        dtype=array.codec.dtype,
        fill_value=0,
        filters=None,
        compressors=zarr_compressors(array.codec) or None,
        dimension_names=("row", *array.stored_dims),
    )


def shard_path(spec: StoreSpec, name: str, shard: int) -> tuple[str, ...]:
    """Where a shard lies in the store: ("embedding", "c", "12", "0", "0")."""
    # A shard spans whole rows, so it is the first along every axis but that of the rows.
    return (name, "c", str(shard), *["0"] * len(spec.arrays[name].dims))


def max_shard_bytes(spec: StoreSpec, name: str) -> int:
    """What a shard file takes at most: its inner chunks, index and checksum."""
    inner = spec.inner_rows(name)
    num_inner = spec.shard_rows // inner
    chunk_bytes = inner * spec.arrays[name].stored_row_bytes
    if spec.arrays[name].codec.compressor != "none":
        # What does not shrink grows a little: Zstandard by 1/256 and 64 bytes at most, Blosc by 32.
        chunk_bytes += chunk_bytes // 256 + 128
    return num_inner * (chunk_bytes + INDEX_ENTRY.itemsize) + 4


def shard_content(spec: StoreSpec, name: str, stored: np.ndarray) -> list[Buffer]:
    """The file of one shard, in pieces: stored [n, *stored_row_shape], n <= shard_rows.

    Empty where every byte is zero: Zarr keeps no file then.
    """
    if spec.arrays[name].codec.compressor != "none":
        return _through_zarr(spec, name, stored)
    inner, row_bytes = spec.inner_rows(name), spec.arrays[name].stored_row_bytes
    index = np.full(spec.shard_rows // inner, NOT_STORED, INDEX_ENTRY)
    pieces: list[Buffer] = []
    place = 0
    for chunk in range(-(-len(stored) // inner)):
        values = stored[chunk * inner : (chunk + 1) * inner]
        as_bytes = values.reshape(-1).view(np.uint8)
        # Bytes, not values: -0.0 is no zero here. Most chunks tell by their beginning.
        if not (as_bytes[:4096].any() or as_bytes.any()):
            continue
        pieces.append(as_bytes.data)
        if len(values) < inner:
            # The table ends within this chunk, but an inner chunk has one size.
            pieces.append(bytes((inner - len(values)) * row_bytes))
        # Places count from the start of the file, since the index is at its end.
        index[chunk] = (place, inner * row_bytes)
        place += inner * row_bytes
    if not pieces:
        return []
    checksum = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    return [*pieces, index.tobytes(), checksum]


def write_shard(
    location: Location, spec: StoreSpec, shard: int, contents: Mapping[str, np.ndarray]
) -> None:
    """Put a shard's files in place, each whole or not at all: name -> [n, *stored_row_shape]."""
    with explained(location):
        for name, stored in contents.items():
            path = shard_path(spec, name, shard)
            if content := shard_content(spec, name, stored):
                location.write_bytes(content, *path)
            else:
                location.remove(*path)


def _through_zarr(spec: StoreSpec, name: str, stored: np.ndarray) -> list[Buffer]:
    """The same, by Zarr itself, in memory."""
    memory: dict = {}
    group = zarr.create_group(MemoryStore(memory))
    # A store of this one shard, in memory: its file is what the real store gets.
    create_data_array(group, name, spec, spec.shard_rows)[: len(stored)] = stored
    buffer = memory.get("/".join(shard_path(spec, name, 0)))
    return [] if buffer is None else [buffer.to_bytes()]


class ShardFile:
    """An uncompressed shard file, read straight into place.

    One that does not exist reads as zeros, which is what Zarr makes of it. Every method raises
    DamagedShardError where the file is cut short or its index is not valid.
    """

    def __init__(self, path: str, open_file: Callable[[], int], spec: StoreSpec, name: str) -> None:
        """path: for messages; open_file: gives a file descriptor, or raises FileNotFoundError."""
        self._path = path
        self._inner = spec.inner_rows(name)
        self._row_bytes = spec.arrays[name].stored_row_bytes
        self._fd: int | None = None
        self.version: tuple[int, ...] = ()  # another one where the file was replaced or written to
        try:
            self._fd = open_file()
        except FileNotFoundError:
            return
        # Of the open file, not the path: a shard that is replaced meanwhile stays readable here.
        status = os.fstat(self._fd)
        self.version = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        try:
            self._offsets = self._read_index(spec.shard_rows // self._inner)
        except DamagedShardError:
            self.close()
            raise

    def read(self, start: int, out: np.ndarray) -> None:
        """Rows from `start`, counted within the shard, into C-contiguous [n, *stored_row_shape]."""
        target, stop = out.reshape(-1).view(np.uint8).data, start + len(out)
        # Chunk by chunk: one of zeros has no bytes, and the others may lie in any order.
        for chunk in range(start // self._inner, -(-stop // self._inner)):
            first, last = max(start, chunk * self._inner), min(stop, (chunk + 1) * self._inner)
            self.read_row(
                first, target[(first - start) * self._row_bytes : (last - start) * self._row_bytes]
            )

    def read_row(self, row: int, out: memoryview) -> None:
        """One row, or several of one inner chunk, into the bytes that are to hold them."""
        if self._fd is None or (offset := self._offsets[row // self._inner]) == NOT_STORED:
            out[:] = bytes(len(out))
            return
        offset += row % self._inner * self._row_bytes
        if os.preadv(self._fd, [out], offset) != len(out):
            raise DamagedShardError(f"{self._path}: cut short in row {row} of the shard")

    def announce(self, start: int, stop: int) -> None:
        """Ask the system to have rows start:stop in its page cache soon; returns at once."""
        # What is there already (by its first and last row) is not asked for: that costs time too.
        if self._fd is None or (self._is_cached(start) and self._is_cached(stop - 1)):
            return
        for chunk in range(start // self._inner, -(-stop // self._inner)):
            first = max(start - chunk * self._inner, 0)
            last = min(stop - chunk * self._inner, self._inner)
            offset, length = self._offsets[chunk], (last - first) * self._row_bytes
            if offset != NOT_STORED and hasattr(os, "posix_fadvise"):
                offset += first * self._row_bytes
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _is_cached(self, row: int) -> bool:
        """True where a row can be had without waiting."""
        assert self._fd is not None
        if (offset := self._offsets[row // self._inner]) == NOT_STORED:
            return True
        offset += row % self._inner * self._row_bytes
        try:
            return os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # it is not, or this system cannot tell
            return False

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_index(self, num_inner: int) -> list[int]:
        """The place of every inner chunk, from the end of the file (and a CRC-32C after it)."""
        assert self._fd is not None
        length, size = num_inner * INDEX_ENTRY.itemsize, os.fstat(self._fd).st_size
        tail = b""
        if size >= length + 4:
            tail = os.pread(self._fd, length + 4, size - length - 4)
        checksum = int.from_bytes(tail[-4:], "little")
        if len(tail) != length + 4 or google_crc32c.value(tail[:-4]) != checksum:
            raise DamagedShardError(
                f"{self._path}: {size} bytes, without a valid shard index at the end"
            )
        index = np.frombuffer(tail[:-4], INDEX_ENTRY)
        stored = index["offset"] != NOT_STORED
        if (index["nbytes"][stored] != self._inner * self._row_bytes).any():
            raise DamagedShardError(f"{self._path}: its inner chunks have another size")
        return index["offset"].tolist()
