"""Text files as other programs write them: their encoding, their line ends, compressed or not."""

from __future__ import annotations

import codecs
import gzip
import io
import os
from collections.abc import Iterator
from typing import IO, cast

from corpora.records import CaptionTableError

MAX_LINE = 2**20
"""Characters; a longer line is no row of a table."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CHUNK = 2**20
_BINARY = {
    b"PK\3\4": "an Excel workbook or a zip archive: save it as CSV (UTF-8), or unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save it as CSV (UTF-8)",
    b"PAR1": "a Parquet file: call it *.parquet",
    b"ARROW1": "an Arrow file: call it *.arrow",
    b"SQLite format 3": "an SQLite database: export the table as CSV",
    b"BZh": "compressed by bzip2: unpack it; gzip alone is read as it is",
    b"\xfd7zXZ": "compressed by xz: unpack it; gzip alone is read as it is",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it; gzip alone is read as it is",
    b"\x80\4\x95": "a pickle, which is never opened: save it as Parquet",
    b"\x80\5\x95": "a pickle, which is never opened: save it as Parquet",
}
"""How files begin that people name in place of a text table, and what they are."""


def marked_encoding(start: bytes) -> str:
    """What the first bytes of a file say, else UTF-8."""
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")


class TextFile:
    """One text file, read as often as needed.

    encoding: None for UTF-8, or what its mark says; a byte that does not fit is then an error.
        Where it is named, such a byte becomes half of a surrogate pair.

    Raises CaptionTableError: no such encoding, or a byte that is not in it, with its place.
    """

    def __init__(self, path: str, encoding: str | None) -> None:
        self.path = path
        self._size = max(os.path.getsize(path), 1)
        self._strict = encoding is None
        start = self._start()
        marked = marked_encoding(start)
        self._encoding = marked if encoding is None else encoding
        if encoding in ("utf-8", "utf8", "UTF-8"):
            self._encoding = "utf-8-sig"
        try:
            codecs.lookup(self._encoding)
        except LookupError:
            raise CaptionTableError(
                f"{path}: captions.encoding: no encoding is called {encoding}"
            ) from None
        for magic, kind in _BINARY.items():
            if self._strict and start.startswith(magic):
                raise CaptionTableError(f"{path}: not a text table but {kind}")
        if marked == "utf-8" and self._strict and b"\0" in start[:64]:
            utf16 = f"utf-16-{'be' if start[0] == 0 else 'le'}"
            hint = f", as in UTF-16 without a mark: set captions.encoding: {utf16}"
            raise CaptionTableError(
                f"{path}: not a UTF-8 text table: byte {start.index(0)} is 0"
                + (hint if start[:2].count(0) == 1 else "")
            )
        self._newline = "\n"
        with self._bytes() as file, self._text(file, "") as text:
            sample = self._decoded(text, 2**16)
        if "\n" not in sample and "\r" in sample:
            self._newline = "\r"
        self.done = 0.0
        """How much of the file the last pass has read, from 0 to 1."""

    def lines(self) -> Iterator[str]:
        """Every line with one line feed at its end; a line that is too long is given cut off,
        without it."""
        with self._bytes() as file, self._text(file, self._newline) as text:
            stored = getattr(file, "fileobj", file)  # under gzip
            for number in range(1, 2**62):
                line = self._decoded(text, MAX_LINE)
                if not line:
                    break
                if number % 1024 == 1:
                    self.done = stored.tell() / self._size
                if line.endswith(self._newline) or len(line) < MAX_LINE:
                    line = line.rstrip("\r\n")
                    yield (line.replace("\r", " ") if "\r" in line else line) + "\n"
                    continue
                yield line[:80]
                while (rest := self._decoded(text, MAX_LINE)) and rest[-1] != self._newline:
                    pass

    def text(self) -> str:
        """All of it."""
        with self._bytes() as file, self._text(file, "") as text:
            return self._decoded(text, -1)

    def _decoded(self, text: io.TextIOWrapper, size: int) -> str:
        try:
            return text.read() if size < 0 else text.readline(size)
        except UnicodeError as error:
            raise CaptionTableError(
                f"{self.path}: not a {self._encoding.removesuffix('-sig').upper()} text table: "
                f"byte {self._first_bad_byte()} ({getattr(error, 'reason', error)}); "
                "captions.encoding names another encoding, such as cp1252"
            ) from error
        except (EOFError, OSError) as error:
            raise CaptionTableError(f"{self.path}: cannot be read ({error})") from error

    def _bytes(self) -> IO[bytes]:
        with open(self.path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        return cast(IO[bytes], gzip.open(self.path)) if compressed else open(self.path, "rb")

    def _text(self, file: IO[bytes], newline: str) -> io.TextIOWrapper:
        errors = "strict" if self._strict else "surrogateescape"
        return io.TextIOWrapper(file, self._encoding, errors, newline)

    def _start(self) -> bytes:
        try:
            with self._bytes() as file:
                return file.read(64)
        except (EOFError, OSError) as error:
            raise CaptionTableError(f"{self.path}: cannot be read ({error})") from error

    def _first_bad_byte(self) -> int:
        decoder = codecs.getincrementaldecoder(self._encoding)()
        before = 0
        with self._bytes() as file:
            while True:
                held = len(decoder.getstate()[0])
                chunk = file.read(_CHUNK)
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    return before - held + error.start
                except UnicodeError:
                    return before
                if not chunk:
                    return before
                before += len(chunk)
