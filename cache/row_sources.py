"""Where the rows of a shuffled epoch come from: one array of one store, window by window."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache.checksums import bytes_checksum
from cache.codec import decode
from cache.epoch_order import Window
from cache.layout import checksum_name
from cache.memory import Memory
from cache.reading import read_sorted
from cache.shards import DamagedShardError, ShardFile
from cache.store import EmbeddingStore

OPEN_SHARDS = 256  # files kept open per array
READ_THREADS = 2  # that share the rows of a batch
ANNOUNCED_GAP = 64 << 10  # bytes between two rows that are asked for in one go
THREADED_BYTES = 4 << 20  # smaller batches are read in one thread


class _Source:
    """One array of one store, taken from window by window.

    `prepare(window)` runs in another thread, while rows are taken from the window before. `enter`
    makes a window the one to take from. `take` decodes rows of it (int64 [k], offsets into
    window.rows) into out [k, *shape], checked, and gives {damaged row: what is wrong with it}.
    `release` ends an epoch.
    """

    def __init__(self, store: EmbeddingStore, name: str) -> None:
        self.store, self.name = store, name
        self.fitted = store.fitted(name)
        self.checksums: NDArray[np.uint32] = store.read_table(checksum_name(name))
        array = store.array_spec(name)
        self.values = Memory(array.shape, self.fitted.decoded_dtype)

    def shards(self, window: Window) -> list[int]:
        """The shards of a window, in the order in which they are read."""
        size = self.store.spec.shard_rows
        return list(dict.fromkeys(int(s) for p in window.pieces for s in np.unique(p // size)))


class StraightSource(_Source):
    """On a disk and uncompressed: rows are read from their files into the batch, with one copy.

    Preparing a window asks the system to read its blocks, so that the page cache is the buffer. A
    row is checked when it is first read, and again when its file has changed since: checking costs
    two thirds as much as reading.
    """

    def __init__(self, store: EmbeddingStore, name: str) -> None:
        super().__init__(store, name)
        self._files: dict[int, ShardFile] = {}
        self._versions: dict[int, tuple[int, ...]] = {}  # of the files whose rows were checked
        self._checked = np.zeros(store.num_rows, bool)
        self._damaged: set[int] = set()
        array = store.array_spec(name)
        self._stored = Memory(array.stored_row_shape, np.dtype(array.codec.dtype))
        self._gap = 1 + ANNOUNCED_GAP // array.stored_row_bytes
        self._rows = np.zeros(0, np.int64)
        self._readers = ThreadPoolExecutor(READ_THREADS, "cache-read")

    def prepare(self, window: Window) -> None:
        """Ask the system for the bytes of a window's rows, in a thread beside."""
        size = self.store.spec.shard_rows
        for piece in window.pieces:
            for shard in np.unique(piece // size):
                inside = piece[piece // size == shard] - shard * size
                # Of several processes, each asks for its own rows only.
                runs = np.split(inside, np.flatnonzero(np.diff(inside) > self._gap) + 1)
                try:
                    # No copy is fetched for this: it may come late, when the rows have been read
                    # and the copy has made room.
                    with self.store.open_shard(self.name, int(shard), fetch=False) as file:
                        for run in runs:
                            file.announce(int(run[0]), int(run[-1]) + 1)
                except DamagedShardError:
                    pass  # its rows tell when they are taken

    def enter(self, window: Window, prepared: Future[None]) -> None:
        """Make a window the one that `take` reads."""
        self._rows = window.rows  # no need to wait: rows that are not in the page cache are read
        self.release()

    def take(self, offsets: NDArray[np.int64], out: np.ndarray) -> dict[int, str]:
        """Read and decode rows of the window into `out`; gives the damaged ones and why."""
        rows = self._rows[offsets]
        as_stored = self.fitted.first is None and self.fitted.scale is None
        stored = out if as_stored else self._stored.empty(len(rows))
        files, bad = self._open(rows)
        # [k, bytes of a row], of the batch itself where nothing has to be decoded.
        as_bytes = stored.reshape(-1).view(np.uint8).reshape(len(rows), -1)
        parts = READ_THREADS if stored.nbytes >= THREADED_BYTES else 1
        cuts = [len(rows) * i // parts for i in range(parts + 1)]
        jobs = [(rows[start:stop], as_bytes[start:stop]) for start, stop in pairwise(cuts)]
        reads = self._readers.map if parts > 1 else map
        for found in reads(lambda job: self._read(job[0], job[1], files), jobs):
            bad.update(found)
        if not as_stored:
            decode(self.fitted, stored, slice(None), out)
        self._damaged.update(bad)
        return bad

    def release(self) -> None:
        """Close the shard files of the window."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        # Again and again: one that was asked for ahead may come after its rows have been read.
        for shard in {row // self.store.spec.shard_rows for row in self._damaged}:
            self.store.discard_copy(self.name, shard)

    def _open(self, rows: NDArray[np.int64]) -> tuple[dict[int, ShardFile], dict[int, str]]:
        """The files of rows by shard, and the rows of files that cannot be opened."""
        # All at once: a window is of few blocks, and soon has its own files open again.
        if len(self._files) > OPEN_SHARDS:
            self.release()
        bad: dict[int, str] = {}
        shards = rows // self.store.spec.shard_rows
        for shard in np.unique(shards).tolist():
            try:
                if shard not in self._files:
                    self._files[shard] = file = self.store.open_shard(self.name, shard)
                    if self._versions.get(shard) != file.version:
                        self._versions[shard] = file.version
                        size = self.store.spec.shard_rows
                        # Another file than the one whose rows were checked: all of its rows are to
                        # be checked again.
                        self._checked[shard * size : (shard + 1) * size] = False
            except DamagedShardError as e:
                bad.update(dict.fromkeys(rows[shards == shard].tolist(), f"unreadable: {e}"))
        return self._files, bad

    def _read(
        self, rows: NDArray[np.int64], out: NDArray[np.uint8], files: dict[int, ShardFile]
    ) -> dict[int, str]:
        """Read rows into out [k, bytes of a row]; returns the damaged ones."""
        bad, size = {}, self.store.spec.shard_rows
        length, address, target = out.shape[1], out.ctypes.data, out.reshape(-1).data
        numbers, inside = np.divmod(rows, size)
        for i, (shard, row, checked) in enumerate(
            zip(numbers.tolist(), inside.tolist(), self._checked[rows].tolist())
        ):
            # Its file could not be opened: `_open` has told of these rows.
            if shard not in files:
                out[i] = 0
                continue
            try:
                files[shard].read_row(row, target[i * length : (i + 1) * length])
            except DamagedShardError as e:
                out[i] = 0
                bad[int(rows[i])] = f"unreadable: {e}"
                continue
            # Row by row, while the row is still in the processor's cache.
            if not checked and self._is_sound(int(rows[i]), address + i * length, length, bad):
                self._checked[rows[i]] = True
        return bad

    def _is_sound(self, row: int, address: int, length: int, bad: dict[int, str]) -> bool:
        if bytes_checksum(address, length) == self.checksums[row]:
            return True
        bad[row] = "checksum differs"
        return False


class BufferedSource(_Source):
    """Compressed, or remote without copies: read through Zarr into a buffer beside that in use."""

    def __init__(self, store: EmbeddingStore, name: str) -> None:
        super().__init__(store, name)
        self._buffers = [self._buffer(0), self._buffer(0)]  # in use, being filled
        self._rows = np.zeros(0, np.int64)
        self._bad: list[dict[int, str]] = [{}, {}]  # as the buffers

    def prepare(self, window: Window) -> None:
        """Read a window's rows as stored into the buffer that is not in use."""
        if len(self._buffers[1]) < len(window.rows):
            self._buffers[1] = self._buffer(len(window.rows))
        bad: dict[int, str] = {}
        at = 0
        for piece in window.pieces:
            into = self._buffers[1][at : at + len(piece)]
            bad.update(read_sorted(self.store, self.name, piece, self.checksums, into))
            at += len(piece)
        self._bad[1] = bad

    def enter(self, window: Window, prepared: Future[None]) -> None:
        """Wait for a window, and make it the one that `take` reads."""
        prepared.result()
        self._rows = window.rows
        # What was filled is in use now; the other is free for the next window.
        self._buffers.reverse()
        self._bad.reverse()

    def take(self, offsets: NDArray[np.int64], out: np.ndarray) -> dict[int, str]:
        """Decode rows of the window into `out`; gives the damaged ones and why."""
        decode(self.fitted, self._buffers[0], offsets, out)
        bad = self._bad[0]
        return {row: bad[row] for row in self._rows[offsets].tolist() if row in bad} if bad else {}

    def release(self) -> None:
        """Keeps its buffers, for the next epoch."""

    def _buffer(self, size: int) -> np.ndarray:
        array = self.store.array_spec(self.name)
        return np.empty((size, *array.stored_row_shape), array.codec.dtype)


RowSource: TypeAlias = StraightSource | BufferedSource


def row_source(store: EmbeddingStore, name: str) -> RowSource:
    """How rows of this array are read best: single rows from the file, or whole blocks."""
    return (StraightSource if store.reads_straight(name) else BufferedSource)(store, name)
