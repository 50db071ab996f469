"""How far a run is, for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Progress:
    """Rows of this run: how many there are, are settled, and failed; seconds since it began."""

    num_rows: int
    settled: int
    failed: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        return self.settled / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        return (
            (self.num_rows - self.settled) / self.rows_per_second if self.settled else float("inf")
        )

    def __str__(self) -> str:
        share = self.settled / max(1, self.num_rows)
        left = f"{self.seconds_left:,.0f} s left" if self.settled else "no estimate yet"
        failed = f", {self.failed:,} failed" if self.failed else ""
        return (
            f"{self.settled:,} of {self.num_rows:,} rows ({share:.0%}), "
            f"{self.rows_per_second:,.0f} rows/s, {left}{failed}"
        )


def print_progress(
    label: str, stream: TextIO | None = None, every: float = 5.0
) -> Callable[[Progress], None]:
    """A progress callback that prints a line: at most one in `every` seconds, and the last."""
    shown = [0.0]

    def show(progress: Progress) -> None:
        now = time.monotonic()
        if now - shown[0] >= every or progress.settled == progress.num_rows:
            shown[0] = now
            print(f"{label}: {progress}", file=stream or sys.stderr, flush=True)

    return show
