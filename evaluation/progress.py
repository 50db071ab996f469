"""Long work a batch at a time, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gill_progress import Ticker

BATCH = 64


class Meter(Ticker):
    """Shows how far long work is, how fast, and how long it will still take."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        super().__init__(what)
        self._total, self._unit, self._done = total, unit, 0
        self._start = time.monotonic()

    def add(self, number: int) -> None:
        """Show the state after `number` more: `96 of 100 pictures, 12.3 per second, 1 s left`."""
        self._done += number
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        left = _duration((self._total - self._done) / rate)
        self.show(f"{self._done} of {self._total} {self._unit}, {rate:.1f} per second, {left} left")

    def __enter__(self) -> Meter:
        return self


def in_batches(
    work: Callable[[Any], Tensor],
    items: Sequence[Any] | Tensor,
    what: str = "vectors",
    size: int = BATCH,
) -> Tensor:
    """What `work` makes of `size` items at a time, put together: float32 on the CPU, [N, ...]."""
    parts = []
    with Meter(what, len(items), "examples") as meter:
        for first in range(0, len(items), size):
            batch = items[first : first + size]
            parts.append(work(batch).float().cpu())
            meter.add(len(batch))
    return torch.cat(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
