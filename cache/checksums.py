"""Checksums of rows and fingerprints of tables: what ties a stored row to what was written."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable

import google_crc32c
import numpy as np
from numpy.typing import NDArray


def row_checksums(stored: np.ndarray, rows: Iterable[int] | None = None) -> NDArray[np.uint32]:
    """CRC-32C of every row's bytes as they are stored (little-endian, C order, before compression).

    stored: [n, ...] -> uint32 [n]; or of these rows alone, in their order. About 10 GB/s a core:
    cheap enough for every read of an epoch.
    """
    numbers = list(range(len(stored)) if rows is None else rows)
    if len(numbers) == 0 or stored[0].size == 0:
        return np.zeros(len(numbers), np.uint32)
    as_bytes = np.ascontiguousarray(stored).reshape(len(stored), -1).view(np.uint8)
    start, size = as_bytes.ctypes.data, as_bytes.shape[1]
    sums = (bytes_checksum(start + row * size, size) for row in numbers)
    return np.fromiter(sums, np.uint32, len(numbers))


def _bytes_checksum() -> Callable[[int, int], int]:
    try:
        # The C library under google_crc32c, which holds the lock of the interpreter for all that
        # is no `bytes` object: other threads would wait for every row.
        from google_crc32c import _crc32c

        function = ctypes.CDLL(_crc32c.__file__).crc32c_value
    except (ImportError, OSError, AttributeError):  # its wheel is built otherwise
        return lambda address, size: google_crc32c.value(ctypes.string_at(address, size))
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint32
    return function


bytes_checksum = _bytes_checksum()
"""CRC-32C of the bytes at an address, so many of them; other threads run meanwhile."""


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
