"""Whose the page's uploads are."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

_VISITOR = re.compile(r"[A-Za-z0-9_-]{32}")


def new_visitor() -> str:
    """A name for a visitor that nobody can guess."""
    return secrets.token_urlsafe(24)


def is_visitor(name: str) -> bool:
    """Whether `name` could be one of `new_visitor`."""
    return _VISITOR.fullmatch(name) is not None


class Uploads:
    """Which visitor uploaded which files below `folder`, each for `seconds`."""

    def __init__(
        self, folder: Path, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._seconds, self._clock = folder, seconds, clock
        self._until: OrderedDict[tuple[str, str], float] = OrderedDict()

    def note(self, visitor: str, paths: Iterable[str]) -> None:
        """The visitor has uploaded these files."""
        now = self._clock()
        for path in paths:
            self._until[visitor, path] = now + self._seconds
            self._until.move_to_end((visitor, path))
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)

    def are_of(self, visitor: str, path: str) -> bool:
        """Whether the visitor uploaded the file, not too long ago."""
        return self._until.get((visitor, path), 0.0) > self._clock()

    def keep(self, path: str) -> bool:
        """Whether `path` is, letter for letter, that of a plain file below the folder."""
        try:
            plain = stat.S_ISREG(os.lstat(path).st_mode)
            return plain and os.path.realpath(path) == path and self._folder in Path(path).parents
        except (OSError, ValueError):  # not there; not a path at all
            return False
