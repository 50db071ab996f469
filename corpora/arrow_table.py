"""Caption tables of columns: Parquet."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corpora.records import Exclusion
from corpora.source_rows import (
    OPTIONAL,
    REQUIRED,
    CaptionSource,
    CaptionTableError,
    SourceRow,
    ignored_columns,
)


class ParquetSource(CaptionSource):
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
        self._columns = [name for name in (*REQUIRED, *OPTIONAL) if name in schema.names]
        self.ignored_columns = ignored_columns(table, schema.names)
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
