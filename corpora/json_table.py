"""Caption tables of JSON records: one a line, or one list of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from corpora.caption_params import CaptionParams
from corpora.columns import Columns, find_columns, ignored_columns
from corpora.records import CaptionTableError, Exclusion
from corpora.source_rows import FileSource, Record
from corpora.text_files import TextFile

_Numbered = Iterator[tuple[int, Any]]


class JsonTable(FileSource):
    """JSON files. What a file is, its first character says; the first record says the columns."""

    def __init__(
        self, params: CaptionParams, files: list[str], splits: dict[str, str] | None = None
    ) -> None:
        super().__init__(params, files, splits)
        self._texts = {file: TextFile(file, params.encoding) for file in files}
        self._columns: dict[str, Columns] = {}
        for file in files:
            first = next((value for _, value in self._values(file) if isinstance(value, dict)), {})
            if not first:
                raise CaptionTableError(
                    f"{file}: no record {{...}} in it: expected one a line, or a list of them"
                )
            self._columns[file] = find_columns(file, list(first), params.columns)
            self.ignored_columns = ignored_columns(list(first), self._columns[file])

    def read(self, file: str) -> Iterator[Record | Exclusion]:
        """Rows of one file, in order."""
        for row, value in self._values(file):
            self.done(self._texts[file].done)
            if isinstance(value, ValueError):
                yield Exclusion(file, str(row), "not JSON", str(value))
            elif isinstance(value, dict):
                yield self.record_of(file, row, value, self._columns[file])
            else:
                yield Exclusion(file, str(row), "malformed", "expected a record {...}")

    def _values(self, file: str) -> _Numbered:
        lines = self._texts[file].lines()
        first = next((line.lstrip("\ufeff").lstrip() for line in lines if line.strip()), "")
        return self._listed(file) if first.startswith("[") else self._by_line(file)

    def _by_line(self, file: str) -> _Numbered:
        for number, line in enumerate(self._texts[file].lines(), 1):
            if line.strip():
                try:
                    yield number, json.loads(line.lstrip("\ufeff"))
                except (ValueError, RecursionError) as error:
                    yield number, ValueError(str(error))

    def _listed(self, file: str) -> _Numbered:
        """The elements one by one: as objects all of them would take ten times the file's size."""
        text = self._texts[file].text()
        decoder, place = json.JSONDecoder(), text.index("[") + 1
        for number in range(1, len(text)):
            place = _skip(text, place, " \t\n\r")
            if text.startswith("]", place):
                return
            try:
                value, place = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                raise CaptionTableError(f"{file}: element {number}: {error}") from error
            yield number, value
            self._texts[file].done = place / len(text)
            place = _skip(text, place, " \t\n\r")
            if not text.startswith((",", "]"), place):
                raise CaptionTableError(f"{file}: element {number}: no comma or ] follows it")
            place += text.startswith(",", place)


def _skip(text: str, place: int, characters: str) -> int:
    while place < len(text) and text[place] in characters:
        place += 1
    return place
