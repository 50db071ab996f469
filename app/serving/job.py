"""One turn to answer, and whom to tell."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.talking.answers import (
    ConversationError,
    Event,
    GeneratedImage,
    ReplySettings,
    RetrievedImage,
    SeenPart,
    Text,
)
from pipeline.talking.conversation import Conversation, Turn

_log = logging.getLogger(__name__)

Stop = Literal["left", "late", "refused", "broken"]
_REASONS = {
    "left": "stopped",
    "late": "the answer took too long",
    "broken": "this could not be answered; the log says why",
}


@dataclass(frozen=True)
class Failed:
    """The answer ends here. left: nobody waits for it any more; late: its deadline is over;
    refused: the turn is at fault, `reason` says why; broken: anything else, in the log."""

    stop: Stop
    reason: str
    error: ConversationError | None = None
    """What is wrong with a turn that is refused."""

    @classmethod
    def because(cls, stop: Stop) -> Failed:
        """With the reason that all have in common."""
        return cls(stop, _REASONS[stop])

    @classmethod
    def after(cls, error: Exception) -> Failed:
        """What an exception means for the one who asked."""
        if isinstance(error, ConversationError):
            return cls("refused", str(error), error)
        return cls.because("broken")


@dataclass(eq=False)
class Job:
    """A turn to answer. `parts` is called in the worker's thread, so that pictures are decoded only
    when it is their turn; `listen` is called there too and must not wait."""

    conversation: Conversation
    parts: Callable[[], Sequence[SeenPart]]
    settings: ReplySettings
    listen: Callable[[Event | Failed], None]
    deadline: float = math.inf
    """On the clock of `time.monotonic`."""
    alone: bool = False
    """Not to be answered together with others."""
    has_spoken: bool = False
    """Some of the answer was told."""
    _left: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop at the next token or denoising step; a place in the line is free at once."""
        self._left.set()

    @property
    def stopped(self) -> Stop | None:
        """Why there is no point in going on, if there is none."""
        if self._left.is_set():
            return "left"
        return "late" if time.monotonic() > self.deadline else None

    def prepare(self) -> Turn | None:
        """The turn, read; None where the listener was told why not."""
        if self.stopped is not None:
            self.tell(Failed.because(self.stopped))
            return None
        try:
            return self.conversation.prepare(
                self.parts(), self.settings, cancelled=lambda: self.stopped is not None
            )
        except Exception as error:
            failed = Failed.after(error)
            if failed.stop == "broken":
                _log.exception("a turn could not be read")
            self.tell(failed)
        return None

    def tell(self, event: Event | Failed) -> None:
        """Pass an event on; a listener that fails has left."""
        self.has_spoken |= isinstance(event, Text | RetrievedImage | GeneratedImage)
        try:
            self.listen(event)
        except Exception:  # it is gone, for example a closed event loop
            _log.debug("nobody listens", exc_info=True)
            self.cancel()
