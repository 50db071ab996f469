"""Whether the quotation marks around cells of a text table belong to the file or to the text.

A program that quotes cells leaves no quotation mark outside of one, and doubles those inside. The
TSV of Conceptual Captions, and the released GILL's, quote nothing: a mark is a mark. A table with
signs of both, or of neither, is refused: each reading would give wrong captions in silence.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence

from corpora.caption_params import Quoting
from corpora.records import CaptionTableError
from corpora.text_files import MAX_LINE, TextFile

Rows = Iterator[list[str]]


def csv_reader(lines: Iterator[str], delimiter: str, quoting: Quoting) -> csv.Reader:  # type: ignore[name-defined]
    """Python's reader for these lines, which raises csv.Error where a row breaks the rules."""
    csv.field_size_limit(2 * MAX_LINE)
    if quoting == "literal":
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    if quoting == "escaped":
        return csv.reader(
            lines, delimiter=delimiter, escapechar="\\", doublequote=False, strict=True
        )
    return csv.reader(lines, delimiter=delimiter, strict=True)


def agreed_quoting(
    file: TextFile, start: int, header_quoted: bool, width: int, delimiter: str, image: int
) -> Quoting:
    """What all rows after line `start`, the header, say together.

    width: the number of columns. image: the place of the picture, whose quotation marks matter to
    neither reading.

    Raises CaptionTableError with a row for each reading, and the setting that decides.
    """
    signs = _Signs(width, delimiter, image)
    lines = file.lines()
    for _ in range(start):
        next(lines, None)
    signs.read(lines, start)
    quoted = 1 if header_quoted else signs.quoted
    if quoted and signs.bare:
        raise _undecided(file.path, signs, quoted, "escaped" if signs.escaped else None)
    if quoted:
        return "quoted"
    either = signs.unclear or signs.needless
    if not either or (signs.bare and delimiter == "\t"):
        return "literal"
    sure = delimiter != "\t" or signs.whole_columns_are_quoted or signs.commas_are_quoted
    if sure and not (signs.bare or signs.unclear):
        return "quoted"
    raise _undecided(file.path, signs, either, None)


def _undecided(path: str, signs: _Signs, quoted: int, hint: str | None) -> CaptionTableError:
    against = f", but line {signs.bare} has one that is text" if signs.bare else ", others not"
    likely = f" (likely {hint}: a backslash stands before some)" if hint else ""
    return CaptionTableError(
        f"{path}: line {quoted} has quotation marks around a cell{against}: set captions.quoting: "
        f"quoted, if the marks belong to the file, or literal, if they belong to the text{likely}"
    )


class _Signs:
    """The first line, 0 for none, that speaks for each reading."""

    def __init__(self, width: int, delimiter: str, image: int) -> None:
        self.quoted = 0
        """A quoted cell with a mark, the delimiter or a line break inside."""
        self.needless = 0
        """A quoted cell that holds nothing of the kind."""
        self.bare = 0
        """A mark in a cell that is not quoted, or quoted wrongly."""
        self.unclear = 0
        """A quoted cell over several lines, or rows of which two have one mark each."""
        self.escaped = False
        self._width, self._delimiter, self._image = width, delimiter, image
        self._without_quotes = [0] * width
        self._with_quotes = [0] * width
        self._needless_without_comma = self._commas_without_quotes = False

    @property
    def whole_columns_are_quoted(self) -> bool:
        """As by programs that quote all text; one cell says too little."""
        return all(
            not bare and count > 1
            for bare, count in zip(self._without_quotes, self._with_quotes)
            if count
        )

    @property
    def commas_are_quoted(self) -> bool:
        """As in Excel's text with tabs."""
        return not (self._needless_without_comma or self._commas_without_quotes)

    def read(self, lines: Iterator[str], number: int) -> None:
        """Look at all lines; `number` lines stand before them."""
        ahead: deque[str] = deque()
        plain = True  # whether a line without marks can still say something new
        while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
            number += 1
            if '"' not in line:
                if plain:
                    plain = self._note_plain(line)
                continue
            record = [line]

            def more(first: str = line, record: list[str] = record) -> Iterator[str]:
                yield first
                size = len(first)
                while size < MAX_LINE:
                    following = ahead.popleft() if ahead else next(lines, None)
                    if following is None:
                        return
                    record.append(following)
                    size += len(following)
                    yield following

            cells = self._cells(more(), "quoted")
            if cells is None:
                self.bare = self.bare or number
                self.escaped |= '\\"' in line
                ahead.extendleft(reversed(record[1:]))
                continue
            if self._may_be_rows(record):
                self.unclear = self.unclear or number
            else:
                self._note(number, "".join(record).rstrip("\n"), cells)
            number += len(record) - 1

    def _cells(self, lines: Iterator[str], quoting: Quoting) -> list[str] | None:
        try:
            cells = next(csv_reader(lines, self._delimiter, quoting))
        except csv.Error:
            return None
        return cells if len(cells) == self._width else None

    def _may_be_rows(self, record: Sequence[str]) -> bool:
        """Whether each of several lines would be a row by itself, if marks were text."""
        return len(record) > 1 and all(
            line.count(self._delimiter) + 1 == self._width for line in record
        )

    def _note_plain(self, line: str) -> bool:
        cells = line.rstrip("\n").split(self._delimiter)
        if len(cells) == self._width:
            for place, cell in enumerate(cells):
                self._without_quotes[place] += cell != ""
            self._commas_without_quotes |= any("," in cell for cell in cells)
        return not (self._commas_without_quotes and all(self._without_quotes))

    def _note(self, number: int, raw: str, cells: list[str]) -> None:
        place = 0
        for column, cell in enumerate(cells):
            written = '"' + cell.replace('"', '""') + '"'
            if raw.startswith(written, place):
                inside = '"' in cell or self._delimiter in cell or "\n" in cell
                if inside:
                    self.quoted = self.quoted or number
                elif column != self._image:
                    self.needless = self.needless or number
                    self._with_quotes[column] += 1
                    self._needless_without_comma |= "," not in cell
                place += len(written)
            else:
                if '"' in cell and column != self._image:
                    self.bare = self.bare or number
                    self.escaped |= '\\"' in cell
                self._without_quotes[column] += cell != ""
                self._commas_without_quotes |= "," in cell
                place += len(cell)
            place += len(self._delimiter)
