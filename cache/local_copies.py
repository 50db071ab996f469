"""Copies of shards on this machine's disk, of a bounded size: for stores that are far or slow.

fsspec's `filecache` has no bound, and counts what a killed process left half-written. Here a copy
has its name only when it is whole, and the folder's files are all the state there is:

    <name>.shard            a copy; its time of change is when it was last asked for (`fetch`)
    <name>.<bytes>.partial  on its way, room being kept for <bytes>; the fetching process holds its
                            lock, so that one without a holder is what a killed process left
    lock                    held whenever a name appears, changes or goes
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cache.location import OWN_DISK, Location
from cache.settings import ReadingParams
from gill_errors import InputError
from gill_files import PARTIAL_SUFFIX, explained

COPY_SUFFIX = ".shard"
WAIT_SECONDS = 0.05  # between two looks for room, while all of it is promised to other fetches


@dataclass(frozen=True)
class ShardSource:
    """A shard file, wherever it lies.

    inside: its path in the store at `location`; version: changes when its content does; max_bytes:
    what it takes at most.
    """

    location: Location
    inside: tuple[str, ...]
    version: str
    max_bytes: int

    @property
    def copy_name(self) -> str:
        """What its copy is called: another name for another version."""
        what = "\0".join([self.location.url, *self.inside, self.version])
        return hashlib.blake2b(what.encode(), digest_size=16).hexdigest()


class LocalCopies:
    """Whole shards in `folder`, at most `limit` bytes; the least recently used make room.

    Any number of processes and threads of one machine may share a folder. A shard is fetched once,
    whoever wants it; killed at any moment, a process leaves nothing that counts.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def open(self, shard: ShardSource) -> int:
        """A file descriptor of the copy, which stays readable when the copy goes.

        Raises FileNotFoundError where the store has no such shard, StoreUnreachableError where it
        does not answer, InputError where the limit is less than the shard, WriteFailedError.
        """
        while True:
            try:
                return self.open_present(shard)
            except FileNotFoundError:
                self._fetch(shard, time.time_ns())  # it may have to go again at once

    def open_present(self, shard: ShardSource) -> int:
        """The same, of a copy that is there. Raises FileNotFoundError where there is none."""
        return os.open(self._copy(shard), os.O_RDONLY)

    def fetch(self, shard: ShardSource, asked_ns: int | None = None) -> None:
        """Have a copy, by fetching it or by waiting for whoever does. Raises as `open` does.

        asked_ns: what counts as its last use, by `time.time_ns`; None: now.
        """
        asked = time.time_ns() if asked_ns is None else asked_ns
        try:
            os.utime(self._copy(shard), ns=(asked, asked))
        except FileNotFoundError:
            self._fetch(shard, asked)

    def discard(self, shard: ShardSource) -> None:
        """Have no copy: it holds damaged rows, be it the store's fault or this disk's."""
        self._copy(shard).unlink(missing_ok=True)

    def _copy(self, shard: ShardSource) -> Path:
        return self.folder / (shard.copy_name + COPY_SUFFIX)

    def _fetch(self, shard: ShardSource, asked: int) -> None:
        if shard.max_bytes > self.limit:
            raise InputError(
                f"cache_limit is {self.limit:,} bytes, but {'/'.join(shard.inside)} of "
                f"{shard.location} may take {shard.max_bytes:,}: allow for several such shards"
            )
        copy = self._copy(shard)
        partial = self.folder / f"{shard.copy_name}.{shard.max_bytes}{PARTIAL_SUFFIX}"
        while (begun := self._begin(copy, partial, shard.max_bytes)) is not None:
            handle, is_ours = begun
            try:
                if is_ours:
                    self._complete(shard, partial, copy, asked)
                    return
                fcntl.flock(handle, fcntl.LOCK_SH)  # until the other is done, or has failed
            finally:
                os.close(handle)

    def _begin(self, copy: Path, partial: Path, size: int) -> tuple[int, bool] | None:
        """The partial file, and whether it is locked for us; None where there is a copy by now."""
        while True:
            with self._names_locked(), explained(self.folder):
                if copy.exists():
                    return None
                # With that of another fetch of this shard there is nothing to make room for.
                if partial.exists() or self._make_room(size):
                    handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o600)
                    return handle, _try_lock(handle)
            time.sleep(WAIT_SECONDS)

    def _complete(self, shard: ShardSource, partial: Path, copy: Path, asked: int) -> None:
        try:
            shard.location.download(partial, *shard.inside)
            # Not when it has come, nor when it is opened: what is asked for ahead must not go
            # before what was asked for earlier and has been read by now.
            os.utime(partial, ns=(asked, asked))
            with self._names_locked():
                partial.replace(copy)
        except OSError as error:
            with self._names_locked():
                partial.unlink(missing_ok=True)
            if error.errno in OWN_DISK:
                with explained(self.folder):
                    raise
            raise

    def _make_room(self, size: int) -> bool:
        """Remove dead fetches, and copies until `size` more bytes fit; False: others fetch now."""
        promised, copies = 0, []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(PARTIAL_SUFFIX):
                if _is_abandoned(entry.path):
                    os.unlink(entry.path)
                else:
                    promised += int(entry.name.split(".")[-2])
            elif entry.name.endswith(COPY_SUFFIX):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # discarded meanwhile
                    continue
                copies.append((status.st_mtime_ns, status.st_size, entry.path))
        if promised + size > self.limit:
            return False
        used = sum(nbytes for _, nbytes, _ in copies)
        for _, nbytes, path in sorted(copies):
            if promised + used + size <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            used -= nbytes
        return True

    @contextmanager
    def _names_locked(self) -> Iterator[None]:
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def local_copies(params: ReadingParams) -> LocalCopies | None:
    """The folder of shards that the params ask for."""
    if params.cache_limit is None:
        return None
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return LocalCopies(Path(params.cache_folder or caches / "gill" / "shards"), params.cache_limit)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_abandoned(partial: str) -> bool:
    handle = os.open(partial, os.O_RDWR)
    try:
        return _try_lock(handle)
    finally:
        os.close(handle)
