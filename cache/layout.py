"""What a store holds and how its rows are cut into shards.

    store.zarr/                      Zarr v3 group; its attributes carry spec, provenance, versions
      embedding          [N, L, D]   one file per shard of `shard_rows` rows
      embedding_scale    [D]         int8: value = stored * embedding_scale + embedding_offset
      embedding_offset   [D]
      embedding_first    [D]         share_first: position 0, and embedding is [N, L - 1, D]
      empty_embedding    [L, D]      a constant: one array for the whole corpus
      row_status         [N] uint8   0 pending, 1 done, 2 failed: the only proof that a row is there
      row_key            [N] uint64  fingerprint of what the row was made from
      row_reason         [N, 160]    UTF-8 bytes, why a row failed
      embedding_checksum [N] uint32  CRC-32C of the row's stored bytes
      embedding_error    [N] float32 relative squared error of storing the row
    store.manifest.json              what DVC tracks
    store.lock                       held by the run that writes

Bookkeeping lies in a few large chunks, so that 3.3 million rows make fewer than 4,000 files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from pydantic import Field, model_validator

from cache.codec import Codec
from gill_errors import InputError
from gill_records import Record

MAX_FILES = 4000  # of one store: file systems, backups and object listings stay quick
BOOKKEEPING_CHUNK = 131_072  # rows
REASON_BYTES = 160
REASON_CHUNK = 16_384  # rows
INNER_CHUNK_BYTES = 2 << 20  # the smallest piece that plain Zarr reads: large enough to be quick


class ArraySpec(Record):
    """One value per row: an array [N, *dims]."""

    dims: dict[str, int] = Field(
        description="Names and sizes of the axes after the row: {position: 77, channel: 768}"
    )
    codec: Codec = Codec()

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes after the row."""
        return tuple(self.dims.values())

    @property
    def stored_dims(self) -> dict[str, int]:
        """The axes as stored: a shared first position shortens the first of them by one."""
        if not self.codec.share_first:
            return self.dims
        (name, size), *rest = self.dims.items()
        return {f"{name}_after_first": size - 1, **dict(rest)}

    @property
    def stored_row_shape(self) -> tuple[int, ...]:
        """Sizes of the stored axes after the row."""
        return tuple(self.stored_dims.values())

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one row as stored, before compression."""
        return math.prod(self.stored_row_shape) * np.dtype(self.codec.dtype).itemsize

    @model_validator(mode="after")
    def _check(self) -> ArraySpec:
        if not self.dims or min(self.dims.values()) < 1:
            raise InputError(f"every axis needs a size of at least 1, got {self.dims}")
        if self.codec.share_first and (len(self.dims) < 2 or self.shape[0] < 2):
            raise InputError(f"share_first needs positions and channels, got the axes {self.dims}")
        return self


class StoreSpec(Record):
    """Everything about a store that must not change under the rows in it."""

    arrays: dict[str, ArraySpec] = Field(min_length=1)
    constants: dict[str, dict[str, int]] = Field(
        default={}, description="Arrays kept once for the corpus, float32: name -> axes"
    )
    shard_rows: int = Field(
        default=1024,
        ge=1,
        description="Rows per shard file: the unit of writing, and of work lost by a kill",
    )

    @model_validator(mode="after")
    def _check(self) -> StoreSpec:
        names = [name for array in self.arrays for name in (array, *_companions(array))]
        names += list(self.constants)
        for name in names:
            if not name.isidentifier() or name.startswith("row_") or names.count(name) > 1:
                raise InputError(
                    f"array name {name!r} is taken, starts with row_ or is no identifier"
                )
        sizes: dict[str, int] = {}
        everything = [a.dims for a in self.arrays.values()] + list(self.constants.values())
        for dims in [*everything, *(a.stored_dims for a in self.arrays.values())]:
            for axis, size in dims.items():
                if axis in ("row", "reason_byte") or sizes.setdefault(axis, size) != size:
                    raise InputError(
                        f"axis {axis!r} is reserved or has two sizes ({sizes.get(axis)}, {size}): "
                        "xarray needs one size per axis name"
                    )
        return self

    def num_shards(self, num_rows: int) -> int:
        """How many shards hold so many rows; the last may be short."""
        return -(-num_rows // self.shard_rows)

    def shard_range(self, shard: int, num_rows: int) -> range:
        """The rows of a shard: 2 of 1024 -> range(2048, 3072), cut at the end of the table."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, num_rows))

    def inner_rows(self, name: str) -> int:
        """Rows per inner chunk: the largest divisor of shard_rows within INNER_CHUNK_BYTES."""
        # A divisor: inner chunks then tile the shard, and its index has one entry for each.
        rows = min(self.shard_rows, max(1, INNER_CHUNK_BYTES // self.arrays[name].stored_row_bytes))
        while self.shard_rows % rows:
            rows -= 1
        return rows

    def most_files(self, num_rows: int) -> int:
        """How many files a full store of this size has at most."""
        # Key and status, and checksums and errors of each array; reasons are cut otherwise.
        tables = 2 + 2 * len(self.arrays)
        chunks = -(-num_rows // BOOKKEEPING_CHUNK) * tables + -(-num_rows // REASON_CHUNK)
        metadata = 1 + tables + 1 + len(self.arrays)
        # Metadata and one chunk each: constants, and an array's scale, offset and first.
        once = 2 * (len(self.constants) + 3 * len(self.arrays))
        return self.num_shards(num_rows) * len(self.arrays) + chunks + metadata + once

    def check_num_files(self, num_rows: int) -> None:
        """Raises ValueError, naming a shard size that fits, where there would be too many files."""
        if self.most_files(num_rows) <= MAX_FILES:
            return
        better = self.shard_rows
        while better < num_rows and (
            self.model_copy(update={"shard_rows": better}).most_files(num_rows) > MAX_FILES
        ):
            better *= 2
        raise InputError(
            f"{num_rows:,} rows in shards of {self.shard_rows} would make "
            f"{self.most_files(num_rows):,} files, more than {MAX_FILES:,}: set shard_rows to "
            f"{better}"
        )


class Table(NamedTuple):
    """One bookkeeping array: [N] or [N, width]."""

    dtype: str
    chunk: int
    width: int | None = None


def bookkeeping(spec: StoreSpec) -> dict[str, Table]:
    """The bookkeeping arrays of a store by name. `row_status`, last, is what commits a row."""
    tables = {"row_key": Table("uint64", BOOKKEEPING_CHUNK)}
    for name, array in spec.arrays.items():
        tables[checksum_name(name)] = Table("uint32", BOOKKEEPING_CHUNK)
        if array.codec.is_lossy:
            tables[error_name(name)] = Table("float32", BOOKKEEPING_CHUNK)
    tables["row_reason"] = Table("uint8", REASON_CHUNK, REASON_BYTES)
    tables["row_status"] = Table("uint8", BOOKKEEPING_CHUNK)
    return tables


def checksum_name(array: str) -> str:
    """The bookkeeping array of an array's checksums."""
    return f"{array}_checksum"


def error_name(array: str) -> str:
    """The bookkeeping array of what storing cost each row."""
    return f"{array}_error"


def fitted_name(array: str, part: str) -> str:
    """The array of a fitted part: `scale`, `offset` or `first`."""
    return f"{array}_{part}"


def _companions(array: str) -> Iterator[str]:
    yield checksum_name(array)
    yield error_name(array)
    yield from (fitted_name(array, part) for part in ("scale", "offset", "first"))
