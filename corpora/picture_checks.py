"""Checks many pictures in parallel, each of them once, and remembers the verdicts.

The journal is a SQLite file beside the checked table: an interrupted check continues where it
stopped, and a table that has grown is checked at the price of its new pictures. A picture is
looked at again when its size or time of change differs, or when the rules do.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import PIL

from corpora.caption_params import CheckLevel
from corpora.picture_errors import PictureError, PictureErrorKind
from corpora.pictures import PictureStat, check_picture, stat_picture
from corpora.records import CorpusError
from gill_errors import OutOfMemoryError

_FORMAT = 1
_PARTS_PER_WORKER = 4
_QUERY_SIZE = 500  # SQLite allows 999 variables in older builds

_T = TypeVar("_T")


class Verdict(NamedTuple):
    """`identity` (16 bytes) of a good picture; otherwise `kind` and `detail` of the refusal."""

    identity: bytes
    kind: PictureErrorKind | None = None
    detail: str = ""


class PictureChecks:
    """A pool of threads (Pillow decodes without the interpreter's lock) and the journal.

    Use as a context manager. Raises CorpusError for a damaged journal.
    """

    def __init__(self, journal: Path, check: CheckLevel, max_pixels: int, workers: int) -> None:
        self._check = check
        self._max_pixels = max_pixels
        self._workers = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers, "pictures")
        journal.parent.mkdir(parents=True, exist_ok=True)
        self._path = journal
        self._journal = sqlite3.connect(journal)
        with self._transaction():
            # Only a power cut can damage the journal, which can be made anew: no waiting for the
            # disk after every block.
            self._journal.execute("PRAGMA synchronous = OFF")
            self._begin(f"{_FORMAT} {check} {max_pixels} Pillow {PIL.__version__}")

    def __enter__(self) -> "PictureChecks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._journal.close()

    def verdicts(self, references: Sequence[str]) -> dict[str, Verdict]:
        """The verdict on each distinct reference; those of unchanged pictures are remembered."""
        distinct = list(dict.fromkeys(references))
        verdicts: dict[str, Verdict] = {}
        found: dict[str, PictureStat] = {}
        for reference, status in zip(distinct, self._in_parts(_status, distinct)):
            if isinstance(status, Verdict):
                verdicts[reference] = status
            else:
                found[reference] = status
        with self._transaction():
            verdicts |= self._remembered(found)
        new = [reference for reference in found if reference not in verdicts]
        fresh = dict(zip(new, self._in_parts(lambda name: self._look(name, found[name]), new)))
        with self._transaction():
            self._journal.executemany(
                "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?)",
                [(name, found[name].version, *verdict) for name, verdict in fresh.items()],
            )
        return verdicts | fresh

    def _in_parts(self, work: Callable[[str], _T], names: Sequence[str]) -> Iterator[_T]:
        """`work` on each name, some at a time: a task costs as much as a small header."""
        size = -(-len(names) // (_PARTS_PER_WORKER * self._workers)) or 1
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        return chain.from_iterable(self._pool.map(lambda part: [work(n) for n in part], parts))

    def _look(self, reference: str, status: PictureStat) -> Verdict:
        try:
            return Verdict(check_picture(reference, self._check, self._max_pixels, status))
        except PictureError as error:
            return Verdict(b"", error.kind, error.detail)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"not enough memory to open {reference}: set captions.max_pixels or run.readers "
                "lower; the verdicts so far are kept"
            ) from error

    def _remembered(self, statuses: dict[str, PictureStat]) -> dict[str, Verdict]:
        found: dict[str, Verdict] = {}
        names = list(statuses)
        for start in range(0, len(names), _QUERY_SIZE):
            some = names[start : start + _QUERY_SIZE]
            query = f"SELECT * FROM pictures WHERE reference IN ({','.join('?' * len(some))})"
            for name, version, identity, kind, detail in self._journal.execute(query, some):
                if statuses[name].version == version:
                    found[name] = Verdict(identity, kind, detail)
        return found

    def _begin(self, rules: str) -> None:
        self._journal.execute("CREATE TABLE IF NOT EXISTS rules (rules TEXT)")
        if self._journal.execute("SELECT rules FROM rules").fetchall() != [(rules,)]:
            self._journal.execute("DELETE FROM rules")
            self._journal.execute("DROP TABLE IF EXISTS pictures")
            self._journal.execute("INSERT INTO rules VALUES (?)", (rules,))
        self._journal.execute(
            "CREATE TABLE IF NOT EXISTS pictures (reference TEXT PRIMARY KEY, version TEXT, "
            "identity BLOB, kind TEXT, detail TEXT) WITHOUT ROWID"
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._journal:
                yield
        except sqlite3.DatabaseError as error:
            raise CorpusError(
                f"{self._path}: cannot be used ({error}); if nothing else is using it, delete it"
            ) from error


def _status(reference: str) -> PictureStat | Verdict:
    try:
        return stat_picture(reference)
    except PictureError as error:  # never remembered: the file may appear later
        return Verdict(b"", error.kind, error.detail)
