"""Parquet and Arrow files: their columns in batches, and single pictures out of them.

Arrow files are mapped into memory, so any row of theirs costs nothing. Parquet is compressed by row
groups: a picture costs its group, of which the last ones are kept.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpora.records import CaptionTableError
from gill_errors import InputError

PARQUET = (".parquet", ".pq")
_MAX_GROUP_BYTES = 2**29
_MAX_KEPT_BYTES = 2**29

_groups: OrderedDict[tuple[str, str, str, int], pa.Array] = OrderedDict()
_lock = threading.Lock()


class CellError(InputError):
    """A cell of a file that is no picture's."""


def open_schema(file: str) -> tuple[pa.Schema, int]:
    """The columns, and the number of rows. Raises CaptionTableError."""
    try:
        if file.lower().endswith(PARQUET):
            with pq.ParquetFile(file) as parquet:
                return parquet.schema_arrow, parquet.metadata.num_rows
        table = _arrow(file)
        return table.schema, table.num_rows
    except (pa.ArrowException, OSError) as error:
        kind = "Parquet" if file.lower().endswith(PARQUET) else "Arrow"
        raise CaptionTableError(f"{file}: not a readable {kind} file ({error})") from error


def batches(file: str, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns, so many rows at a time. Raises CaptionTableError where the file is damaged."""
    done = 0
    try:
        if file.lower().endswith(PARQUET):
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=rows, columns=columns):
                    yield batch
                    done += batch.num_rows
        else:
            for batch in _arrow(file).select(columns).to_batches(max_chunksize=rows):
                yield batch
                done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise CaptionTableError(f"{file}: damaged after row {done} ({error})") from error


def read_cell(file: str, place: str) -> bytes:
    """The picture at `COLUMN:ROW`, rows counted from 0.

    Raises OSError, or CellError: there is no such cell, or its row group is too large to be read
    for one picture.
    """
    column, _, row = place.rpartition(":")
    if not column or not row.isdecimal():
        raise CellError(f"{place} is no COLUMN:ROW")
    try:
        if file.lower().endswith(PARQUET):
            cell = _parquet_cell(file, column, int(row))
        else:
            cell = _pictures(_arrow(file).column(column))[int(row)]
    except (pa.ArrowException, IndexError, KeyError) as error:
        raise CellError(f"{file} has no cell {place} ({error})") from error
    data = cell.as_py()
    if not isinstance(data, bytes):
        raise CellError(f"{file} has no picture in {place}")
    return data


def _parquet_cell(file: str, column: str, row: int) -> pa.Scalar:
    status = os.stat(file)
    version = f"{status.st_size}:{status.st_mtime_ns}"
    with pq.ParquetFile(file) as parquet:
        metadata = parquet.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        group = int(np.searchsorted(ends, row, side="right"))
        if group == len(sizes):
            raise IndexError(f"it has {metadata.num_rows} rows")
        key = (file, version, column, group)
        with _lock:
            cells = _groups.get(key)
            if cells is None:
                if metadata.row_group(group).total_byte_size > _MAX_GROUP_BYTES:
                    raise CellError(
                        f"{file}: row group {group} is larger than {_MAX_GROUP_BYTES} bytes: write "
                        "it anew with row groups of some hundred rows"
                    )
                cells = _pictures(parquet.read_row_group(group, columns=[column]).column(column))
                _groups[key] = cells
                while (
                    len(_groups) > 1 and sum(c.nbytes for c in _groups.values()) > _MAX_KEPT_BYTES
                ):
                    _groups.popitem(last=False)
            _groups.move_to_end(key)
    return cells[row - int(ends[group]) + sizes[group]]


def _kept_bytes() -> int:
    return sum(cells.nbytes for cells in _groups.values())


def _pictures(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _arrow(file: str) -> pa.Table:
    source = pa.memory_map(file)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()
