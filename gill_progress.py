"""One line of progress for people: rewritten in place on a terminal, sparse in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Ticker:
    """Shows the latest state of long work, at most every `interval` seconds.

    >>> with Ticker("encoding") as ticker:
    ...     ticker.show("12 of 80 rows, 40 rows/s, 2 s left")
    """

    def __init__(self, what: str, interval: float | None = None) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._interval = interval if interval is not None else (0.2 if self._terminal else 10.0)
        self._next = time.monotonic() + (0.0 if self._terminal else 2.0)
        self._shown = False

    def show(self, state: object) -> None:
        """Show `state`, unless something was shown just now."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._interval
        self._shown = True
        end = "" if self._terminal else "\n"
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{self._what}: {state}", end=end, file=sys.stderr, flush=True)

    def __enter__(self) -> Ticker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._terminal and self._shown:
            print(file=sys.stderr)
