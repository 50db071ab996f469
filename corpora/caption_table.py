"""The checked caption table: a Parquet file whose row order is the row order of every cache.

    column   type            what
    id       string          unique; from the source, or its row number, or SHARD/KEY
    image    string          relative to the table's `root`
    caption  string          one line, without control characters
    split    string          train, val or test; documents for pictures of corpora.document_table
    row      int64           where in the source: line, row or sample, counted from 1
    picture  16 bytes        identity of the picture (corpora.pictures.check_picture)
    key      16 bytes        hash of picture and caption: what a cached row depends on

The fingerprint of a table is a hash of the row count and of the keys in order.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpora.records import CaptionRow, CaptionTableError
from gill_errors import InputError

SPLITS = ("train", "val", "test")
DOCUMENTS = "documents"
"""The split of pictures that stand in documents, which no caption pass reads."""
_FORMAT = b"1"
_ROWS_PER_GROUP = 4096
_MAX_CACHED_GROUPS = 64
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("caption", pa.string()),
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("row", pa.int64()),
        ("picture", pa.binary(16)),
        ("key", pa.binary(16)),
    ]
)


class CheckedRow(NamedTuple):
    """A row as stored; see the module's table."""

    id: str
    image: str
    caption: str
    split: str
    row: int
    picture: bytes

    @property
    def key(self) -> bytes:
        """BLAKE2b of picture and caption: 16 bytes."""
        return hashlib.blake2b(self.picture + self.caption.encode(), digest_size=16).digest()


class CaptionTableWriter:
    """Writes rows as they come; the file appears under its name only when `close` is called.

    Use as a context manager: leaving it by an error removes what was written.
    """

    def __init__(self, path: Path, root: str) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = pq.ParquetWriter(
            self._partial, _SCHEMA, compression="zstd", use_dictionary=["split"]
        )
        self._root = root
        self._rows: list[CheckedRow] = []
        self._keys = bytearray()
        self._open = True

    def append(self, row: CheckedRow) -> None:
        """Write a row, a group at a time."""
        self._rows.append(row)
        if len(self._rows) == _ROWS_PER_GROUP:
            self._flush()

    def close(self) -> str:
        """Completes the file; returns the fingerprint of its rows."""
        self._flush()
        fingerprint = _fingerprint(bytes(self._keys))
        self._file.add_key_value_metadata(
            {"caption_table": _FORMAT, "root": self._root, "fingerprint": fingerprint}
        )
        self._file.close()
        self._open = False
        os.replace(self._partial, self._path)
        return fingerprint

    def __enter__(self) -> "CaptionTableWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._rows:
            return
        keys = [row.key for row in self._rows]
        self._keys += b"".join(keys)
        columns: list[Any] = [list(column) for column in zip(*self._rows, strict=True)]
        batch = pa.record_batch(
            [pa.array(column, field.type) for column, field in zip([*columns, keys], _SCHEMA)],
            schema=_SCHEMA,
        )
        self._file.write_batch(batch, row_group_size=_ROWS_PER_GROUP)
        self._rows.clear()


class CaptionTable:
    """A checked table, read in blocks: what is not asked for is not in memory.

    Rows in order, or near each other, are cheap; scattered rows cost one block of 4096 each.
    Safe to use from several threads.

    Raises:
        CaptionTableError: not a table that `check_captions` wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = pq.ParquetFile(self.path)
        except FileNotFoundError as error:
            raise CaptionTableError(f"{path}: no such file; check the caption table") from error
        except (pa.ArrowException, OSError) as error:
            raise CaptionTableError(f"{path}: not a readable Parquet file ({error})") from error
        metadata = self._file.metadata.metadata or {}
        if metadata.get(b"caption_table") != _FORMAT:
            raise CaptionTableError(f"{path}: not a checked caption table; check it first")
        self.root = metadata[b"root"].decode()
        self.fingerprint = metadata[b"fingerprint"].decode()
        sizes = [
            self._file.metadata.row_group(group).num_rows
            for group in range(self._file.metadata.num_row_groups)
        ]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._cache: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> CaptionRow:
        return self.take([row])[0]

    def __iter__(self) -> Iterator[CaptionRow]:
        return self.rows()

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[CaptionRow]:
        """Rows start .. stop - 1, block by block; an image is ready for `open_picture`."""
        stop = len(self) if stop is None else min(stop, len(self))
        while start < stop:
            group = int(np.searchsorted(self._starts, start, side="right")) - 1
            end = min(stop, int(self._starts[group + 1]))
            yield from self.take(range(start, end))
            start = end

    def take(self, rows: Sequence[int] | np.ndarray) -> list[CaptionRow]:
        """Any rows, in the order asked for. Raises IndexError."""
        return [
            CaptionRow(*cells)
            for cells in zip(
                self._column("id", rows),
                self.images(rows),
                self._column("caption", rows),
                self._column("split", rows),
            )
        ]

    def captions(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The captions of any rows, in the order asked for. Raises IndexError."""
        return self._column("caption", rows)

    def images(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """References for `open_picture`, in the order asked for. Raises IndexError."""
        return [os.path.join(self.root, image) for image in self._column("image", rows)]

    def pictures(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        """The identity of each row's picture: equal for equal files. Raises IndexError."""
        return self._column("picture", rows)

    def row_keys(self) -> np.ndarray:
        """uint8 [N, 16]: what a cached row depends on, its picture and its caption."""
        # The keys lie one after the other in the Arrow buffers: 16 bytes each, from the offset on.
        keys = b"".join(
            memoryview(chunk.buffers()[1])[16 * chunk.offset : 16 * (chunk.offset + len(chunk))]
            for chunk in self._whole("key").chunks
        )
        return np.frombuffer(keys, np.uint8).reshape(-1, 16)

    def rows_of_split(self, split: str) -> np.ndarray:
        """int64 [n], ascending: the rows of one split. Raises ValueError for an unknown one."""
        if split not in (*SPLITS, DOCUMENTS):
            raise InputError(f"split {split!r} is none of {', '.join(SPLITS)}")
        mask = pc.equal(self._whole("split").cast(pa.string()), split)
        return np.flatnonzero(mask.to_numpy())

    def find(self, id: str) -> int:
        """The row with this id. Raises KeyError."""
        for group in range(len(self._starts) - 1):
            place = self._block(group, "id").index(id).as_py()
            if place >= 0:
                return int(self._starts[group]) + place
        raise KeyError(f"{self.path} has no row with id {id!r}")

    def _column(self, name: str, rows: Sequence[int] | np.ndarray) -> list[Any]:
        index = np.asarray(rows, np.int64)
        outside = index[(index < 0) | (index >= len(self))]
        if len(outside):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, not {outside[0]}")
        groups = np.searchsorted(self._starts, index, side="right") - 1
        values: list[Any] = [None] * len(index)
        order = np.argsort(groups, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            if not len(places):  # of no rows, np.split makes one empty part
                continue
            group = int(groups[places[0]])
            block = self._block(group, name).take(index[places] - self._starts[group])
            for place, value in zip(places, block.to_pylist()):
                values[place] = value
        return values

    def _block(self, group: int, name: str) -> pa.ChunkedArray:
        with self._lock:
            if (group, name) in self._cache:
                self._cache.move_to_end((group, name))
            else:
                block = self._file.read_row_group(group, columns=[name]).column(name)
                self._cache[group, name] = block
                if len(self._cache) > _MAX_CACHED_GROUPS:
                    self._cache.popitem(last=False)
            return self._cache[group, name]

    def _whole(self, name: str) -> pa.ChunkedArray:
        with self._lock:
            return self._file.read(columns=[name]).column(name)


def _fingerprint(keys: bytes) -> str:
    return hashlib.blake2b(b"%d\n" % (len(keys) // 16) + keys, digest_size=16).hexdigest()
