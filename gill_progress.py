"""One line of progress for people: rewritten in place on a terminal, sparse in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Ticker:
    """Shows the latest state of long work, at most every `interval` seconds.

    >>> with Ticker("encoding") as ticker:
    ...     ticker.count(12, 80)  # 12 of 80 rows (15%), 40 rows/s, 2 s left
    """

    def __init__(self, what: str, interval: float | None = None, unit: str = "rows") -> None:
        self._what, self._unit = what, unit
        self._terminal = sys.stderr.isatty()
        self._interval = interval if interval is not None else (0.2 if self._terminal else 10.0)
        self._began = time.monotonic()
        self._next = self._began + (0.0 if self._terminal else 2.0)
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

    def count(self, done: int, total: int, failed: int = 0) -> None:
        """Show how many of all are done since this ticker was made, how fast, and what is left."""
        rate = done / max(time.monotonic() - self._began, 1e-9)
        left = f"{duration((total - done) / rate)} left" if done else "no estimate yet"
        self.show(
            f"{done:,} of {total:,} {self._unit} ({done / max(1, total):.0%}), "
            f"{rate:,.0f} {self._unit}/s, {left}{f', {failed:,} failed' if failed else ''}"
        )

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


def duration(seconds: float) -> str:
    """In its largest unit, from two of it on: `90 s`, `5 min`, `3 h`, `2 d`."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
