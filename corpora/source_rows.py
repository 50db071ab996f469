"""What a source of captions gives: rows as they were written, or why a row cannot be read."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from corpora.records import CorpusError, Exclusion

MAX_LINE_BYTES = 2**20
REQUIRED = ("caption", "image")
OPTIONAL = ("id", "split")


class CaptionTableError(CorpusError):
    """A caption table that cannot be used at all."""


class SourceRow(NamedTuple):
    """A row as written: nothing checked yet. `row` is the line of a TSV (the header is line 1),
    the row of a Parquet file, or the sample of a shard, all counted from 1."""

    file: str
    row: int
    image: str
    caption: str
    id: str | None
    split: str | None


class CaptionSource(ABC):
    """An iterable of rows; `root` is what their `image` is relative to."""

    root: str
    ignored_columns: tuple[str, ...] = ()

    @abstractmethod
    def __iter__(self) -> Iterator[SourceRow | Exclusion]: ...

    @abstractmethod
    def fraction(self) -> float:
        """How much of the source has been read, from 0 to 1, for the progress report."""


def ignored_columns(table: str, names: list[str]) -> tuple[str, ...]:
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise CaptionTableError(
            f"{table}: no column {' and no column '.join(missing)}; it has {', '.join(names)}"
        )
    known = (*REQUIRED, *OPTIONAL)
    repeated = [name for name in known if names.count(name) > 1]
    if repeated:
        raise CaptionTableError(f"{table}: column {repeated[0]} is there more than once")
    return tuple(name for name in names if name not in known)
