"""Caption tables of lines: TSV and CSV, with a header, in the dialect of whatever wrote them."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator

from corpora.caption_params import CaptionParams
from corpora.columns import Columns, find_columns, has_columns, ignored_columns
from corpora.quoting import agreed_quoting, csv_reader
from corpora.records import CaptionTableError, Exclusion
from corpora.source_rows import FileSource, Record
from corpora.text_files import MAX_LINE, TextFile

_DELIMITERS = ("\t", ",", ";")


class _Header:
    """Where the header stands, what it says, and how its cells are told apart."""

    def __init__(self, file: TextFile, params: CaptionParams) -> None:
        self.line, text = 0, ""
        for text in file.lines():
            self.line += 1
            if text.strip() and not text.lower().startswith("sep="):  # Excel's own first line
                break
        if not text.strip():
            raise CaptionTableError(f"{file.path}: empty; expected a header caption<TAB>image")
        text = text.lstrip("\ufeff")
        names = {mark: [name.strip() for name in _cells(text, mark)] for mark in _DELIMITERS}
        fitting = [mark for mark in _DELIMITERS if has_columns(names[mark], params.columns)]
        self.delimiter = fitting[0] if fitting else max(_DELIMITERS, key=lambda m: len(names[m]))
        self.names = names[self.delimiter]
        self.quoted = params.quoting != "literal" and text.lstrip().startswith('"')
        if not fitting and not any(map(params.columns.model_dump().get, ("caption", "image"))):
            self._say_what_is_expected(file.path)
        self.columns = find_columns(file.path, self.names, params.columns)
        if self._has_row_names(file):
            self.names = ["row names", *self.names]

    def _has_row_names(self, file: TextFile) -> bool:
        """Whether rows have one cell more than the header: R writes their names so, numbers from 1
        on where there are none."""
        lines = itertools.islice(file.lines(), self.line, self.line + 2)
        rows = [_cells(line, self.delimiter) for line in lines]
        numbered = [row[:1] for row in rows] == [["1"], ["2"]]
        if not self.quoted and not numbered:
            return False
        return bool(rows) and len(rows[0]) == len(self.names) + 1

    def _say_what_is_expected(self, path: str) -> None:
        try:
            find_columns(path, self.names, CaptionParams(table=path).columns)
        except CaptionTableError as error:
            raise CaptionTableError(
                f"{error}. The first line must be the header caption<TAB>image, with id and split "
                "if wanted"
            ) from None


class TextTable(FileSource):
    """TSV and CSV files: tabs, commas or semicolons, as the header has them."""

    def __init__(
        self, params: CaptionParams, files: list[str], splits: dict[str, str] | None = None
    ) -> None:
        super().__init__(params, files, splits)
        self._texts = {file: TextFile(file, params.encoding) for file in files}
        self._headers = {file: _Header(text, params) for file, text in self._texts.items()}
        self._quoting = {file: self._quoting_of(file) for file in files}
        first = self._headers[files[0]]
        self.ignored_columns = ignored_columns(first.names, first.columns)

    def _quoting_of(self, file: str) -> str:
        header = self._headers[file]
        if self.params.quoting != "auto":
            return self.params.quoting
        return agreed_quoting(
            self._texts[file],
            header.line,
            header.quoted,
            len(header.names),
            header.delimiter,
            header.names.index(header.columns.image),
        )

    def read(self, file: str) -> Iterator[Record | Exclusion]:
        """Rows of one file, in order."""
        header, text = self._headers[file], self._texts[file]
        width, columns = len(header.names), header.columns
        caption, image, id_, split = _places(header.names, columns)
        number = 0
        too_long: list[int] = []

        def lines() -> Iterator[str]:
            nonlocal number
            for number, line in enumerate(text.lines(), 1):
                if number <= header.line:
                    continue
                if line.endswith("\n"):
                    yield line
                else:
                    too_long.append(number)

        reader = csv_reader(lines(), header.delimiter, self._quoting[file])  # type: ignore[arg-type]
        number = header.line
        while True:
            line = number + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Exclusion(file, str(line), "broken quoting", f"{error}")
                continue
            while too_long:
                line = max(line, too_long[0] + 1)
                detail = f"over {MAX_LINE} characters"
                yield Exclusion(file, str(too_long.pop(0)), "line too long", detail)
            if cells is None:
                return
            self.done(text.done)
            if len(cells) < 2 and not "".join(cells).strip(" "):
                continue
            if len(cells) != width:
                detail = f"{len(cells)} columns, the header has {width}"
                yield Exclusion(file, str(line), "wrong number of columns", detail)
                continue
            yield Record(
                file,
                line,
                cells[image].strip(),
                [cells[caption]],
                None if id_ is None else cells[id_].strip(),
                None if split is None else cells[split].strip(),
            )


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of a header; as they are where its quotation marks are none of a table's."""
    try:
        return next(csv_reader(iter([line]), delimiter, "quoted"))
    except csv.Error:
        return line.rstrip("\n").split(delimiter)


def _places(header: list[str], columns: Columns) -> tuple[int, int, int | None, int | None]:
    def place(name: str | None) -> int | None:
        return None if name is None else header.index(name)

    return (
        header.index(columns.caption),
        header.index(columns.image),
        place(columns.id),
        place(columns.split),
    )
