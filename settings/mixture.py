"""Which streams of examples a training step is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeVar

Stream = Literal["captions", "documents", "asked", "shown", "told", "joined"]
CHAT_STREAMS: tuple[Stream, ...] = ("asked", "shown", "told", "joined")
Name = TypeVar("Name", bound=str)

CHAT_MIXTURE: dict[Stream, float] = {"asked": 8, "shown": 3, "told": 4, "joined": 1}
"""Of a chat model for which the params name none."""


def shares(mixture: Mapping[Name, float], batch_size: int) -> dict[Name, int]:
    """Examples of each stream in a step: the largest remainders are rounded up.

    `shares({"asked": 2, "told": 1}, 32)` is `{"asked": 21, "told": 11}`.
    """
    total = sum(mixture.values())
    exact = {name: batch_size * weight / total for name, weight in mixture.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    largest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in largest[: batch_size - sum(counts.values())]:
        counts[name] += 1
    return counts
