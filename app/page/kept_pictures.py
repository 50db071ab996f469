"""Pictures of answers under names that nobody can guess and that expire."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable


class KeptPictures:
    """PNG files in memory: each for `seconds`, all together at most `max_bytes`.

    When there is no room the oldest go first. Safe to use from several threads.
    """

    def __init__(
        self, seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._max_bytes, self._clock = seconds, max_bytes, clock
        self._files: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def keep(self, data: bytes) -> str:
        """A new name for the file."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._files[name] = (self._clock() + self._seconds, data)
            self._bytes += len(data)
            self._drop()
        return name

    def get(self, name: str) -> bytes | None:
        """The file, or None when the name is unknown or has expired."""
        with self._lock:
            self._drop()
            kept = self._files.get(name)
        return None if kept is None else kept[1]

    def _drop(self) -> None:
        now = self._clock()
        while self._files:
            name, (until, data) = next(iter(self._files.items()))
            if until > now and self._bytes <= self._max_bytes:
                return
            del self._files[name]
            self._bytes -= len(data)
