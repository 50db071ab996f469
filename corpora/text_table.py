"""Caption tables of lines: TSV."""

import os
from collections.abc import Iterator
from typing import BinaryIO

from corpora.records import Exclusion
from corpora.source_rows import (
    MAX_LINE_BYTES,
    REQUIRED,
    CaptionSource,
    CaptionTableError,
    SourceRow,
    ignored_columns,
)


class TsvSource(CaptionSource):
    def __init__(self, table: str, root: str) -> None:
        self.root = root
        self._table = table
        self._size = max(os.path.getsize(table), 1)
        self._read = 0
        with open(table, "rb") as file:
            names = self._header(file)
        self._width = len(names)
        self._places = {name: place for place, name in enumerate(names)}
        self.ignored_columns = ignored_columns(table, names)

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
        if any(name not in names for name in REQUIRED):
            shown = "<TAB>".join(names)[:80]
            raise CaptionTableError(
                f"{self._table}: the first line must be the header caption<TAB>image, with id "
                f"and split if wanted; it is {shown!r}"
            )
        return names

    def _excluded(self, number: int, reason: str, detail: str) -> Exclusion:
        return Exclusion(self._table, str(number), reason, detail)
