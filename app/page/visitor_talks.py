"""The last talk of every visitor, so that a page that is loaded again goes on with it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Talk = TypeVar("Talk")


class VisitorTalks(Generic[Talk]):
    """One talk per visitor, each for `seconds` from when it was last kept; at most `most`."""

    def __init__(
        self, seconds: float, most: int = 200, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._most, self._clock = seconds, most, clock
        self._talks: OrderedDict[str, tuple[float, Talk]] = OrderedDict()

    def keep(self, visitor: str, talk: Talk) -> None:
        """This is what the visitor talks now."""
        now = self._clock()
        self._talks[visitor] = now + self._seconds, talk
        self._talks.move_to_end(visitor)
        while len(self._talks) > self._most or next(iter(self._talks.values()))[0] <= now:
            self._talks.popitem(last=False)

    def forget(self, visitor: str) -> None:
        """The visitor begins anew."""
        self._talks.pop(visitor, None)

    def of(self, visitor: str) -> Talk | None:
        """What the visitor talked last, if that is not too long ago."""
        until, talk = self._talks.get(visitor, (0.0, None))
        return talk if until > self._clock() else None
