"""The three forms in which captioned pictures come, read row by row as they were written.

    TSV       header `caption<TAB>image` (the released GILL's format), UTF-8, quotes are literal
    Parquet   text columns `caption` and `image`
    tar       webdataset shards as img2dataset writes them: KEY.jpg beside KEY.txt or KEY.json

TSV and Parquet may also have the columns `id` and `split`. Each source yields, in order, a
`SourceRow` or, for a row that cannot even be parsed, an `Exclusion`.
"""

import glob
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from corpora import tar_shards
from corpora.records import CorpusError, Exclusion
from gill_errors import InputError

MAX_LINE_BYTES = 2**20
PICTURE_SUFFIXES = frozenset(
    "jpg jpeg png webp gif bmp tif tiff avif jp2 ppm pgm".split()  # noqa: SIM905
)
_REQUIRED = ("caption", "image")
_OPTIONAL = ("id", "split")


class CaptionTableError(CorpusError):
    """A caption table that cannot be used at all."""


class SourceRow(NamedTuple):
    """A row as written: nothing checked yet. `row` is the line of a TSV (the header is line 1),
    the row of a Parquet file, or the sample of a shard, all counted from 1."""

    file: str
    row: int
    image: str
    caption: str
    id: str | None
    split: str | None


class CaptionSource(ABC):
    """An iterable of rows; `root` is what their `image` is relative to."""

    root: str
    ignored_columns: tuple[str, ...] = ()

    @abstractmethod
    def __iter__(self) -> Iterator[SourceRow | Exclusion]: ...

    @abstractmethod
    def fraction(self) -> float:
        """How much of the source has been read, from 0 to 1, for the progress report."""


def open_source(table: str, images_dir: str | None = None) -> CaptionSource:
    """The source behind `table`: a `.tsv` or `.parquet` file, or tar shards given as a `.tar`
    file, a folder of them, or a glob.

    `images_dir` is what a table's `image` column is relative to: the table's own folder unless
    given. Shards hold their pictures themselves.

    Raises:
        CaptionTableError: nothing there, an unknown form, or a table without the columns.
    """
    path = Path(table)
    pattern = not path.exists() and glob.has_magic(table)
    if path.is_dir() or path.suffix.lower() == ".tar" or pattern:
        if images_dir is not None:
            raise CaptionTableError(
                f"{table}: images_dir is {images_dir}, but tar shards hold their own pictures"
            )
        return _TarSource(table)
    if not path.is_file():
        raise CaptionTableError(f"{table}: no such caption table")
    root = str(path.parent) if images_dir is None else images_dir
    if not os.path.isdir(root):
        raise CaptionTableError(f"{table}: images_dir {root} is not a folder")
    if path.suffix.lower() in (".parquet", ".pq"):
        return _ParquetSource(table, root)
    return _TsvSource(table, root)


class _TsvSource(CaptionSource):
    def __init__(self, table: str, root: str) -> None:
        self.root = root
        self._table = table
        self._size = max(os.path.getsize(table), 1)
        self._read = 0
        with open(table, "rb") as file:
            names = self._header(file)
        self._width = len(names)
        self._places = {name: place for place, name in enumerate(names)}
        self.ignored_columns = _ignored(table, names)

    def fraction(self) -> float:
        return min(self._read / self._size, 1.0)

    def __iter__(self) -> Iterator[SourceRow | Exclusion]:
        caption, image = self._places["caption"], self._places["image"]
        id_, split = self._places.get("id"), self._places.get("split")
        with open(self._table, "rb") as file:
            self._header(file)
            number = 1
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                self._read += len(line)
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while rest := file.readline(MAX_LINE_BYTES):
                        if rest.endswith(b"\n"):
                            break
                    self._read = file.tell()
                    yield self._excluded(number, "line too long", f"over {MAX_LINE_BYTES} bytes")
                    continue
                line = line.rstrip(b"\r\n")
                if not line.strip(b" "):
                    continue
                try:
                    cells = line.decode("utf-8").split("\t")
                except UnicodeDecodeError as error:
                    yield self._excluded(number, "bad encoding", f"not UTF-8: {error.reason}")
                    continue
                if len(cells) != self._width:
                    detail = f"{len(cells)} columns, the header has {self._width}"
                    yield self._excluded(number, "wrong number of columns", detail)
                    continue
                yield SourceRow(
                    self._table,
                    number,
                    cells[image].strip(),
                    cells[caption],
                    None if id_ is None else cells[id_].strip(),
                    None if split is None else cells[split].strip(),
                )

    def _header(self, file: BinaryIO) -> list[str]:
        line = file.readline(MAX_LINE_BYTES)
        self._read = len(line)
        if not line.strip():
            raise CaptionTableError(f"{self._table}: empty; expected a header caption<TAB>image")
        try:
            names = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise CaptionTableError(f"{self._table}: not a UTF-8 text table") from error
        names = [name.strip().lower() for name in names]
        if any(name not in names for name in _REQUIRED):
            shown = "<TAB>".join(names)[:80]
            raise CaptionTableError(
                f"{self._table}: the first line must be the header caption<TAB>image, with id "
                f"and split if wanted; it is {shown!r}"
            )
        return names

    def _excluded(self, number: int, reason: str, detail: str) -> Exclusion:
        return Exclusion(self._table, str(number), reason, detail)


class _ParquetSource(CaptionSource):
    def __init__(self, table: str, root: str) -> None:
        self.root = root
        self._table = table
        self._done = 0
        try:
            with pq.ParquetFile(table) as file:
                schema = file.schema_arrow
                self._rows = file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise CaptionTableError(f"{table}: not a readable Parquet file ({error})") from error
        self._columns = [name for name in (*_REQUIRED, *_OPTIONAL) if name in schema.names]
        self.ignored_columns = _ignored(table, schema.names)
        for name in self._columns:
            kind = schema.field(name).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (_is_text(kind) or (name == "id" and pa.types.is_integer(kind))):
                raise CaptionTableError(f"{table}: column {name} must be text, it is {kind}")

    def fraction(self) -> float:
        return self._done / max(self._rows, 1)

    def __iter__(self) -> Iterator[SourceRow | Exclusion]:
        self._done = 0
        try:
            with pq.ParquetFile(self._table) as file:
                for batch in file.iter_batches(batch_size=4096, columns=self._columns):
                    columns = {name: _texts(batch.column(name)) for name in batch.schema.names}
                    for place in range(batch.num_rows):
                        self._done += 1
                        yield self._row({name: texts[place] for name, texts in columns.items()})
        except (pa.ArrowException, OSError) as error:
            raise CaptionTableError(
                f"{self._table}: damaged after row {self._done} ({error})"
            ) from error

    def _row(self, cells: dict[str, str | bytes | None]) -> SourceRow | Exclusion:
        for name, value in cells.items():
            if isinstance(value, bytes):
                detail = f"{name} is not UTF-8"
                return Exclusion(self._table, str(self._done), "bad encoding", detail)
        texts = {name: "" if cell is None else str(cell).strip() for name, cell in cells.items()}
        return SourceRow(
            self._table,
            self._done,
            texts["image"],
            texts["caption"],
            texts.get("id"),
            texts.get("split"),
        )


class _TarSource(CaptionSource):
    def __init__(self, table: str) -> None:
        if os.path.isdir(table):
            found = glob.glob(os.path.join(glob.escape(table), "*.tar"))
        else:
            found = [table] if os.path.exists(table) else glob.glob(table)
        self._shards = sorted(shard for shard in found if os.path.isfile(shard))
        if not self._shards:
            raise CaptionTableError(f"{table}: no tar shards there")
        self.root = os.path.commonpath([os.path.dirname(shard) or "." for shard in self._shards])
        sizes = [os.path.getsize(shard) for shard in self._shards]
        self._size = max(sum(sizes), 1)
        self._done = 0

    def fraction(self) -> float:
        return min(self._done / self._size, 1.0)

    def __iter__(self) -> Iterator[SourceRow | Exclusion]:
        before = 0
        for shard in self._shards:
            try:
                scan = tar_shards.scan(shard)
            except (OSError, tar_shards.ShardError) as error:
                yield Exclusion(shard, "1", "unreadable shard", str(error))
                scan = tar_shards.Scan([], None)
            samples = _samples(scan.members)
            for number, (key, parts) in enumerate(samples.items(), 1):
                self._done = before + max(part.offset for part in parts)
                yield self._sample(shard, number, key, parts)
            if scan.damage is not None:
                yield Exclusion(shard, str(len(samples) + 1), "damaged shard", scan.damage)
            before += os.path.getsize(shard)
            self._done = before

    def _sample(
        self, shard: str, number: int, key: str, parts: list[tar_shards.Member]
    ) -> SourceRow | Exclusion:
        def excluded(reason: str, detail: str) -> Exclusion:
            return Exclusion(shard, str(number), reason, f"{key}: {detail}")

        path = PurePosixPath(key)
        if path.is_absolute() or ".." in path.parts:
            return excluded("unsafe member name", "absolute, or with ..")
        by_suffix: dict[str, tar_shards.Member] = {}
        for part in parts:
            suffix = part.name[len(key) + 1 :].lower()
            if suffix in by_suffix:
                return excluded("duplicate id", f"several members {part.name}")
            by_suffix[suffix] = part
        pictures = [by_suffix[suffix] for suffix in by_suffix if suffix in PICTURE_SUFFIXES]
        if len(pictures) != 1:
            return excluded("no image" if not pictures else "several images", f"{len(parts)} parts")
        try:
            caption = self._caption(shard, by_suffix)
        except (ValueError, RecursionError) as error:
            return excluded("unreadable caption", str(error))
        relative = os.path.relpath(shard, self.root)
        image = f"{relative}#{pictures[0].name}"
        return SourceRow(shard, number, image, caption, f"{relative[: -len('.tar')]}/{key}", None)

    @staticmethod
    def _caption(shard: str, by_suffix: dict[str, tar_shards.Member]) -> str:
        part = by_suffix.get("txt") or by_suffix.get("json")
        if part is None:
            return ""
        if part.size > MAX_LINE_BYTES:
            raise InputError(f"{part.name} has {part.size} bytes")
        text = tar_shards.read(shard, tar_shards.Location(part.offset, part.size, "")).decode()
        if "txt" in by_suffix:
            return text
        record = json.loads(text)
        caption = record.get("caption") if isinstance(record, dict) else None
        return caption if isinstance(caption, str) else ""


def _samples(members: list[tar_shards.Member]) -> dict[str, list[tar_shards.Member]]:
    """Members by key, in file order; a key is the name up to the first dot of its last part."""
    samples: dict[str, list[tar_shards.Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        if stem and dot:  # a hidden file, or one without a suffix, is no part of a sample
            samples.setdefault(f"{folder}{slash}{stem}", []).append(member)
    return samples


def _ignored(table: str, names: list[str]) -> tuple[str, ...]:
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise CaptionTableError(
            f"{table}: no column {' and no column '.join(missing)}; it has {', '.join(names)}"
        )
    known = (*_REQUIRED, *_OPTIONAL)
    repeated = [name for name in known if names.count(name) > 1]
    if repeated:
        raise CaptionTableError(f"{table}: column {repeated[0]} is there more than once")
    return tuple(name for name in names if name not in known)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _texts(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value
