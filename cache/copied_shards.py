"""Zarr's view of a store whose shards are read from local copies: for what is compressed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore


class CopiedShards(WrapperStore[Store]):
    """A store in which the shards of one array come from elsewhere, everything else as it is."""

    def __init__(self, store: Store, array: str, open_shard: Callable[[int], int]) -> None:
        """open_shard: gives a file descriptor of a shard's copy, or raises FileNotFoundError."""
        super().__init__(store)
        self._prefix, self._open_shard = f"{array}/c/", open_shard

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As Zarr asks for metadata, a shard's index and its inner chunks."""
        if not key.startswith(self._prefix):
            return await super().get(key, prototype, byte_range)
        shard = int(key.removeprefix(self._prefix).partition("/")[0])
        content = await asyncio.to_thread(self._read, shard, byte_range)
        return None if content is None else prototype.buffer.from_bytes(content)

    def _read(self, shard: int, byte_range: ByteRequest | None) -> bytes | None:
        try:
            handle = self._open_shard(shard)
        except FileNotFoundError:  # of zeros
            return None
        try:
            start, stop = 0, os.fstat(handle).st_size
            if isinstance(byte_range, RangeByteRequest):
                start, stop = byte_range.start, min(byte_range.end, stop)
            elif isinstance(byte_range, OffsetByteRequest):
                start = byte_range.offset
            elif isinstance(byte_range, SuffixByteRequest):
                start = max(0, stop - byte_range.suffix)
            return os.pread(handle, stop - start, start) if stop > start else b""
        finally:
            os.close(handle)
