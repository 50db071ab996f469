"""Long work a batch at a time, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gill_progress import Ticker

BATCH = 64


class Meter:
    """How far long work is, how fast, and how long it will still take."""

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit, self._done = total, unit, 0
        self._start = time.monotonic()

    def after(self, number: int) -> str:
        """The state after `number` more: `96 of 100 pictures, 12.3 per second, 1 s left`."""
        self._done += number
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._done) / rate
        return (
            f"{self._done} of {self._total} {self._unit}, {rate:.1f} per second, "
            f"{_duration(left)} left"
        )


def in_batches(
    work: Callable[[Any], Tensor],
    items: Sequence[Any] | Tensor,
    what: str | None = None,
    size: int = BATCH,
) -> Tensor:
    """What `work` makes of `size` items at a time, put together: float32 on the CPU, [N, ...].

    With `what`, it is said how far that is.
    """
    meter, parts = Meter(len(items), "examples"), []
    with nullcontext() if what is None else Ticker(what) as ticker:
        for first in range(0, len(items), size):
            batch = items[first : first + size]
            parts.append(work(batch).float().cpu())
            if ticker is not None:
                ticker.show(meter.after(len(batch)))
    return torch.cat(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
