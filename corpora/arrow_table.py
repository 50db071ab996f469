"""Caption tables of columns: Parquet, and the Arrow files of a data set of `datasets`.

Pictures may be paths, or lie in the table themselves, as `datasets` has them: a struct of bytes and
path, or bytes alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from corpora.arrow_files import batches, open_schema
from corpora.caption_params import CaptionParams
from corpora.columns import Columns, find_columns, ignored_columns
from corpora.records import CaptionTableError, Exclusion
from corpora.references import inside
from corpora.source_rows import FileSource, Record

_ROWS = 4096
_ROWS_WITH_PICTURES = 64


class ArrowTable(FileSource):
    """Parquet and Arrow files."""

    def __init__(
        self, params: CaptionParams, files: list[str], splits: dict[str, str] | None = None
    ) -> None:
        super().__init__(params, files, splits)
        self._columns: dict[str, Columns] = {}
        self._rows: dict[str, int] = {}
        for file in files:
            schema, self._rows[file] = open_schema(file)
            columns = self._columns[file] = find_columns(file, schema.names, params.columns)
            self.ignored_columns = ignored_columns(schema.names, columns)
            _check(file, schema, columns)

    def read(self, file: str) -> Iterator[Record | Exclusion]:
        """Rows of one file, in order."""
        columns = self._columns[file]
        names = [name for name in columns if name is not None]
        kind = open_schema(file)[0].field(columns.image).type
        rows = _ROWS if _is_text(kind) else _ROWS_WITH_PICTURES
        done = 0
        for batch in batches(file, names, rows):
            values = {name: _values(batch.column(name)) for name in names if name != columns.image}
            values[columns.image] = self._images(file, columns.image, batch, done)
            for place in range(batch.num_rows):
                done += 1
                cells = {name: column[place] for name, column in values.items()}
                spoiled = next((name for name, cell in cells.items() if _spoiled(cell)), None)
                if spoiled is not None:
                    yield Exclusion(file, str(done), "bad encoding", f"{spoiled} is not UTF-8")
                    continue
                yield self.record_of(file, done, cells, columns)
            self.done(done / max(self._rows[file], 1))

    def _images(self, file: str, name: str, batch: pa.RecordBatch, before: int) -> list[Any]:
        """Paths, or references into the file where it holds the picture itself."""
        column = batch.column(name)
        if _is_text(column.type):
            return _values(column)
        paths: list[Any] = [None] * len(column)
        if pa.types.is_struct(column.type):
            if column.type.get_field_index("path") >= 0:
                paths = _values(pc.struct_field(column, "path"))
            column = pc.struct_field(column, "bytes")
        own = os.path.relpath(file, self.params.images_dir or os.path.dirname(file) or ".")
        held = column.is_valid().to_pylist()
        return [
            inside(own, f"{name}:{before + place}") if held[place] else paths[place]
            for place in range(len(held))
        ]


def _check(file: str, schema: pa.Schema, columns: Columns) -> None:
    """Refuse columns that can hold no such thing."""
    for role, name in columns._asdict().items():
        kind = None if name is None else schema.field(name).type
        if kind is None or _is_text(kind):
            continue
        numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not (
            (role == "id" and numbers)
            or (role == "caption" and _is_list(kind) and _is_text(kind.value_type))
            or (role == "image" and _holds_pictures(kind))
        ):
            kind_ = str(kind) if len(str(kind)) < 80 else f"{str(kind)[:80]}..."
            raise CaptionTableError(f"{file}: column {name} must be text, it is {kind_}")


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
        return _is_bytes(kind) or pa.types.is_null(kind)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def _values(column: pa.Array) -> list[Any]:
    """The cells; bytes stand for text that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(cell) for cell in _as_bytes(column).to_pylist()]


def _as_bytes(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_list(column.type):
        return column.cast(pa.large_list(pa.large_binary()))
    if pa.types.is_string_view(column.type):
        return column.cast(pa.binary_view())
    return column.cast(pa.large_binary())


def _decoded(cell: Any) -> Any:
    if isinstance(cell, list):
        return [_decoded(one) for one in cell]
    try:
        return cell.decode() if isinstance(cell, bytes) else cell
    except UnicodeDecodeError:
        return cell


def _spoiled(cell: Any) -> bool:
    return isinstance(cell, bytes) or (
        isinstance(cell, list) and any(isinstance(one, bytes) for one in cell)
    )
