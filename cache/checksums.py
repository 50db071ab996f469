"""Checksums of rows and fingerprints of tables: what ties a stored row to what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import google_crc32c
import numpy as np
from numpy.typing import NDArray


def row_checksums(stored: np.ndarray) -> NDArray[np.uint32]:
    """CRC-32C of every row's bytes as they are stored (little-endian, C order, before compression).

    stored: [n, ...] -> uint32 [n]. About 10 GB/s a core: cheap enough for every read of an epoch.
    """
    if len(stored) == 0 or stored[0].size == 0:
        return np.zeros(len(stored), np.uint32)
    rows = np.ascontiguousarray(stored).reshape(len(stored), -1).view(np.uint8)
    return np.fromiter(map(bytes_checksum, rows), np.uint32, len(rows))


def bytes_checksum(row: np.ndarray) -> int:
    """CRC-32C of one row's bytes: uint8 [n]."""
    return google_crc32c.value(row)


def row_keys(fingerprints: Iterable[str]) -> NDArray[np.uint64]:
    """One 64-bit key (BLAKE2b) per row fingerprint: uint64 [N]."""
    digests = b"".join(hashlib.blake2b(f.encode(), digest_size=8).digest() for f in fingerprints)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 over the bytes of arrays (little-endian), as 64 hexadecimal digits."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()


def begins_with(keys: NDArray[np.uint64], fingerprint: str, at_least: int) -> bool:
    """Whether `fingerprint` is the `digest` of the first keys, of `at_least` so many: [N]."""
    as_stored = keys.astype("<u8")
    total = hashlib.sha256(as_stored[:at_least].tobytes())
    for key in as_stored[at_least:]:
        if total.hexdigest() == fingerprint:
            return True
        total.update(key.tobytes())
    return total.hexdigest() == fingerprint
