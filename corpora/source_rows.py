"""What a source of captions gives: rows as they were written, or why a row cannot be read.

A new kind of source is a class as `CaptionSource` describes, and its place in
`corpora.caption_sources`.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from corpora.caption_params import CaptionParams
from corpora.columns import Columns
from corpora.records import Exclusion

MAX_LINE_BYTES = 2**20


class SourceRow(NamedTuple):
    """A row as written: nothing checked yet. `row` is the line of a text table (the header is
    line 1 where nothing stands above it), the record of a Parquet or JSON file, or the sample of a
    shard or folder, all counted from 1."""

    file: str
    row: int
    image: str
    caption: str
    id: str | None
    split: str | None


class Record(NamedTuple):
    """A row before one of its captions is chosen."""

    file: str
    row: int
    image: str
    captions: list[str]
    id: str | None
    split: str | None


class CaptionSource(ABC):
    """An iterable of rows, in the order of the source.

    `root` is what their `image` is relative to, `files` is what was read, but for pictures.
    """

    root: str
    files: list[str]
    ignored_columns: tuple[str, ...] = ()

    def __init__(self, params: CaptionParams) -> None:
        self.params = params

    @abstractmethod
    def records(self) -> Iterator[Record | Exclusion]:
        """Rows in order, and those that cannot be read with the reason."""

    @abstractmethod
    def fraction(self) -> float:
        """How much of the source has been read, from 0 to 1, for the progress report."""

    def __iter__(self) -> Iterator[SourceRow | Exclusion]:
        which = self.params.several_captions
        for record in self.records():
            if isinstance(record, Exclusion):
                yield record
                continue
            file, row, image, captions, id_, split = record
            if len(captions) > 1 and which == "all":
                for place, caption in enumerate(captions, 1):
                    own = id_ if place == 1 else f"{id_ or row}#{place}"
                    yield SourceRow(file, row, image, caption, own, split)
                continue
            place = 0
            if len(captions) > 1 and which == "random":
                place = _drawn(f"{self.params.seed}\0{image}", len(captions))
            yield SourceRow(file, row, image, captions[place] if captions else "", id_, split)


def _drawn(text: str, count: int) -> int:
    """A place below `count` from a hash: the same when rows are added."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count


class FileSource(CaptionSource):
    """A source of table files: their rows are found by their columns' names.

    The pictures are relative to `captions.images_dir`, else each file's to its own folder. `splits`
    names the split of files that have no such column.
    """

    def __init__(
        self, params: CaptionParams, files: list[str], splits: dict[str, str] | None = None
    ) -> None:
        super().__init__(params)
        self.files = files
        self._splits = splits or {}
        folders = [os.path.dirname(file) or "." for file in files]
        self._folder = os.path.commonpath(folders)
        self.root = params.images_dir or self._folder
        self._prefixes = {
            file: "" if params.images_dir else os.path.relpath(folder, self.root)
            for file, folder in zip(files, folders)
        }
        self._sizes = [max(os.path.getsize(file), 1) for file in files]
        self._place = 0
        self._part = 0.0

    def fraction(self) -> float:
        """How much of the files has been read, from 0 to 1."""
        done = sum(self._sizes[: self._place]) + self._part * self._sizes[self._place]
        return min(done / sum(self._sizes), 1.0)

    def records(self) -> Iterator[Record | Exclusion]:
        """Rows of all files, in order."""
        for place, file in enumerate(self.files):
            self._place, self._part = place, 0.0
            several, prefix = len(self.files) > 1, self._prefixes[file]
            stem = os.path.relpath(file, self._folder).rpartition(".")[0]
            split = self._splits.get(file)
            for record in self.read(file):
                if isinstance(record, Record):
                    if split is not None and record.split is None:
                        record = record._replace(split=split)
                    if several and record.id is None:
                        record = record._replace(id=f"{stem}/{record.row}")
                    if prefix not in ("", ".") and not os.path.isabs(record.image):
                        record = record._replace(image=f"{prefix}/{record.image}")
                yield record

    @abstractmethod
    def read(self, file: str) -> Iterator[Record | Exclusion]:
        """The records of one file, with pictures relative to its own folder; calls `done`."""

    def done(self, fraction: float) -> None:
        """Say how much of the file that is being read has been read."""
        self._part = min(fraction, 1.0)

    def record_of(
        self, file: str, row: int, cells: dict[str, Any], columns: Columns
    ) -> Record | Exclusion:
        """A record of typed values. A list of captions is one, numbers that are whole are ids."""
        caption, image = cells.get(columns.caption), cells.get(columns.image)
        captions = caption if isinstance(caption, list) else [caption]
        texts = ["" if text is None else text for text in captions]
        if not all(isinstance(text, str) for text in texts):
            return Exclusion(file, str(row), "malformed", f"{columns.caption} is no text")
        if image is not None and not isinstance(image, str):
            return Exclusion(file, str(row), "malformed", f"{columns.image} is no path")
        id_, split = cells.get(columns.id or ""), cells.get(columns.split or "")
        if isinstance(id_, float) and id_.is_integer():
            id_ = int(id_)
        if isinstance(id_, (bool, float)) or not isinstance(id_, (int, str, type(None))):
            return Exclusion(file, str(row), "malformed", f"{columns.id} {id_!r} is no id")
        if not isinstance(split, (str, type(None))):
            return Exclusion(file, str(row), "malformed", f"{columns.split} {split!r} is no text")
        return Record(
            file,
            row,
            (image or "").strip(),
            texts,
            None if columns.id is None else str("" if id_ is None else id_).strip(),
            None if columns.split is None else (split or "").strip(),
        )
