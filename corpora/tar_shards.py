"""Random access to the members of webdataset tar shards, without reading a shard on each access.

A shard's headers are scanned once per process; afterwards a member is one seek and one read.
Only plain, uncompressed tar files: a compressed one has no offsets. Nothing is ever extracted.
"""

import hashlib
import os
import tarfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gill_errors import InputError

_MAX_CACHED_MEMBERS = 20_000_000  # 24 bytes each


class ShardError(InputError):
    """A shard that is not a readable, uncompressed tar file."""


class Member(NamedTuple):
    """A regular file in a shard; `offset` and `size` of its bytes are in bytes."""

    name: str
    offset: int
    size: int


class Scan(NamedTuple):
    """The members of a shard in file order, and where and why the scan had to stop early."""

    members: list[Member]
    damage: str | None


class Location(NamedTuple):
    """Where a member's bytes lie; `version` changes when the shard file does."""

    offset: int
    size: int
    version: str


class _Index(NamedTuple):
    """Members sorted by the hash of their names: 24 bytes a member instead of some 200."""

    version: str
    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


_indexes: OrderedDict[str, _Index] = OrderedDict()
_lock = threading.Lock()
_scan_lock = threading.Lock()


def scan(shard: str | Path) -> Scan:
    """The regular members of a shard; also fills the index that `locate` uses.

    Raises:
        FileNotFoundError: there is no such file.
        ShardError: it is not an uncompressed tar file.
    """
    status = os.stat(shard)
    members: list[Member] = []
    damage = None
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if info.offset_data + info.size > status.st_size:
                    damage = f"ends in the middle of {info.name}"
                    break
                if info.isreg() and not info.issparse():
                    members.append(Member(info.name, info.offset_data, info.size))
                # tarfile keeps every header otherwise (the attribute is missing from its stub).
                archive.members = []  # type: ignore[attr-defined]
            end = archive.offset
    except tarfile.TarError as error:
        if not members:
            raise ShardError(f"{shard}: not an uncompressed tar file ({error})") from error
        damage = f"damaged after {members[-1].name} ({error})"
    else:
        # tarfile takes an invalid header for the end of the archive; the real end is zeros.
        if damage is None and any(read(shard, Location(end, tarfile.BLOCKSIZE, ""))):
            damage = f"damaged after {members[-1].name if members else 'its start'}"
    _remember(str(shard), _index_of(members, _version(status)))
    return Scan(members, damage)


def locate(shard: str | Path, name: str) -> Location | None:
    """Where the bytes of a member are; None when the shard has no such member.

    Safe to call from several threads. Raises as `scan` does.
    """
    version = _version(os.stat(shard))
    index = _recall(str(shard), version)
    if index is None:
        with _scan_lock:  # the first thread scans, the others wait for its index
            index = _recall(str(shard), version)
            if index is None:
                index = _index_of(scan(shard).members, version)
    key = _hash(name)
    place = int(np.searchsorted(index.keys, key))
    if place == len(index.keys) or index.keys[place] != key:
        return None
    return Location(int(index.offsets[place]), int(index.sizes[place]), index.version)


def read(shard: str | Path, location: Location) -> bytes:
    """The bytes of a member; fewer than `location.size` only if the file shrank meanwhile."""
    with open(shard, "rb") as file:
        file.seek(location.offset)
        return file.read(location.size)


def _index_of(members: list[Member], version: str) -> _Index:
    keys = np.array([_hash(member.name) for member in members], np.uint64)
    order = np.argsort(keys, kind="stable")  # of two members with one name, the first counts
    offsets = np.array([member.offset for member in members], np.int64)
    sizes = np.array([member.size for member in members], np.int64)
    return _Index(version, keys[order], offsets[order], sizes[order])


def _recall(shard: str, version: str) -> _Index | None:
    with _lock:
        index = _indexes.get(shard)
        if index is None or index.version != version:
            return None
        _indexes.move_to_end(shard)
        return index


def _remember(shard: str, index: _Index) -> None:
    with _lock:
        _indexes[shard] = index
        _indexes.move_to_end(shard)
        total = sum(len(each.keys) for each in _indexes.values())
        while total > _MAX_CACHED_MEMBERS and len(_indexes) > 1:
            total -= len(_indexes.popitem(last=False)[1].keys)


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}"


def _hash(name: str) -> np.uint64:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
