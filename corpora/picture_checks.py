"""Checks many pictures in parallel, each of them once, and remembers the verdicts.

The journal is a SQLite file beside the checked table: an interrupted check continues where it
stopped, and a table that has grown is checked at the price of its new pictures. A picture is
looked at again when its size or time of change differs, or when the rules do.
"""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import PIL

from corpora.caption_params import CheckLevel
from corpora.picture_errors import PictureError
from corpora.picture_verdicts import HeaderReaders, Pictures, Verdict, judge
from corpora.pictures import PictureStat, stat_picture
from corpora.records import CorpusError
from corpora.references import split_reference

_FORMAT = 1
_PARTS_PER_WORKER = 4
_WORTH_PROCESSES = 256  # pictures: starting a process costs as much as some thousand headers
_QUERY_SIZE = 500  # SQLite allows 999 variables in older builds

_T = TypeVar("_T")


class PictureChecks:
    """A pool of threads, the processes that read headers for them, and the journal.

    Use as a context manager. Raises CorpusError for a damaged journal.
    """

    def __init__(self, journal: Path, check: CheckLevel, max_pixels: int, workers: int) -> None:
        self._check = check
        self._max_pixels = max_pixels
        self._workers = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers, "pictures")
        self._readers = HeaderReaders(max_pixels)
        self._coming: dict[str, Callable[[], dict[str, Verdict]]] = {}  # asked, not yet waited for
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
        self._readers.close()
        self._journal.close()

    def ask(self, references: Iterable[str]) -> Callable[[], dict[str, Verdict]]:
        """Start looking at pictures; what is returned waits for the verdict on each of them.

        The verdicts on unchanged pictures are remembered, the new ones once they were waited for.
        """
        distinct = list(dict.fromkeys(references))
        verdicts: dict[str, Verdict] = {}
        found: Pictures = {}
        for reference, status in zip(distinct, self._in_parts(_stat, distinct)):
            if isinstance(status, Verdict):
                verdicts[reference] = status
            else:
                found[reference] = status
        with self._transaction():
            verdicts |= self._remembered(found)
        new = [reference for reference in found if reference not in verdicts]
        earlier = {name: self._coming[name] for name in new if name in self._coming}
        new = [name for name in new if name not in earlier]
        far = self._check == "header" and len(new) >= _WORTH_PROCESSES

        def look(names: Sequence[str]) -> list[Verdict]:
            pictures = {name: found[name] for name in names}
            if far and not any(split_reference(name) for name in names):
                return self._readers.judge(pictures)
            return judge(pictures, self._check, self._max_pixels)

        coming = self._in_parts(look, new)

        @cache
        def wait() -> dict[str, Verdict]:
            fresh = dict(zip(new, coming))
            with self._transaction():
                self._journal.executemany(
                    "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?)",
                    [(name, found[name].version, *verdict) for name, verdict in fresh.items()],
                )
            for name in new:
                del self._coming[name]
            theirs = {name: wait_for_it()[name] for name, wait_for_it in earlier.items()}
            earlier.clear()  # else every block would keep the one before it, and that all others
            return verdicts | fresh | theirs

        self._coming |= dict.fromkeys(new, wait)
        return wait

    def _in_parts(
        self, work: Callable[[Sequence[str]], Iterable[_T]], names: Sequence[str]
    ) -> Iterator[_T]:
        """`work` on some of the names at a time: a task costs as much as a small header."""
        size = -(-len(names) // (_PARTS_PER_WORKER * self._workers)) or 1
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        return chain.from_iterable(self._pool.map(work, parts))

    def _remembered(self, statuses: Pictures) -> dict[str, Verdict]:
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


def _stat(references: Sequence[str]) -> list[PictureStat | Verdict]:
    statuses: list[PictureStat | Verdict] = []
    for reference in references:
        try:
            statuses.append(stat_picture(reference))
        except PictureError as error:  # never remembered: the file may appear later
            statuses.append(Verdict(b"", error.kind, error.detail))
    return statuses
