"""Columns of the caption table as sequences, read in blocks however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, overload

from corpora.caption_table import CaptionTable

_BLOCK = 8192


class KeyedRow(NamedTuple):
    """One value of a row, and the key of its picture and caption.

    Both stores carry the same keys: that is what ties them together.
    """

    value: str
    key: str


class KeyedRows(Sequence[KeyedRow]):
    """The captions or the picture references of a table, with the rows' keys."""

    def __init__(self, table: CaptionTable, column: Literal["captions", "images"]) -> None:
        self._read = table.captions if column == "captions" else table.images
        self._keys = table.row_keys()

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, rows: int) -> KeyedRow: ...
    @overload
    def __getitem__(self, rows: slice) -> list[KeyedRow]: ...
    def __getitem__(self, rows: int | slice) -> KeyedRow | list[KeyedRow]:
        span = range(len(self))[rows]
        if isinstance(span, int):
            return self[span : span + 1][0]
        return [
            KeyedRow(value, self._keys[row].tobytes().hex())
            for value, row in zip(self._read(span), span, strict=True)
        ]

    def __iter__(self) -> Iterator[KeyedRow]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]
