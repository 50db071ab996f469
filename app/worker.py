"""One thread that answers for everybody: the model is shared, its users wait in a bounded line.

    submit(Job) -> waiting line -> batch of jobs -> stream_together -> events to each job's listener

Whatever waits when the thread gets free is answered together, up to `max_batch` turns. A listener
hears the conversation's events and, at the end, `Ended` or `Failed`, exactly one of them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.talking.answers import (
    ConversationError,
    Ended,
    Event,
    GeneratedImage,
    Part,
    ReplySettings,
    RetrievedImage,
    Text,
)
from pipeline.talking.batch import stream_together
from pipeline.talking.conversation import Conversation, Turn

_log = logging.getLogger(__name__)

Stop = Literal["left", "late", "refused", "broken"]


class BusyError(RuntimeError):
    """The waiting line is full; `retry_after` (seconds) is when it is likely to have room."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"too many requests are waiting: try again in {retry_after} s")


@dataclass(frozen=True)
class Failed:
    """The answer ends here. left: nobody waits for it any more; late: its deadline is over;
    refused: the turn is at fault, `reason` says why; broken: anything else, in the log."""

    stop: Stop
    reason: str


@dataclass(eq=False)
class Job:
    """A turn to answer. `parts` is called in the worker's thread, so that pictures are decoded only
    when it is their turn; `listen` is called there too and must not wait."""

    conversation: Conversation
    parts: Callable[[], Sequence[Part]]
    settings: ReplySettings
    listen: Callable[[Event | Failed], None]
    deadline: float = math.inf
    """On the clock of `time.monotonic`."""
    _left: threading.Event = field(default_factory=threading.Event)
    _said: bool = False

    def cancel(self) -> None:
        """Stop at the next token or denoising step; a place in the line is free at once."""
        self._left.set()

    @property
    def stopped(self) -> Stop | None:
        """Why there is no point in going on, if there is none."""
        if self._left.is_set():
            return "left"
        return "late" if time.monotonic() > self.deadline else None


class Worker:
    """The thread and its waiting line. `on_batch(turns, seconds)` hears of every finished batch."""

    def __init__(
        self,
        max_waiting: int = 32,
        max_batch: int = 8,
        on_batch: Callable[[int, float], None] = lambda turns, seconds: None,
    ) -> None:
        self.max_waiting, self.max_batch = max_waiting, max_batch
        self._on_batch = on_batch
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_per_job = 0.5
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether submitted jobs will be answered."""
        return self._thread.is_alive() and not self._closed

    @property
    def num_waiting(self) -> int:
        """Jobs in the line that somebody still waits for."""
        with self._changed:
            return self._count_waiting()

    @property
    def num_running(self) -> int:
        """Jobs being answered."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Put the job in the line, or raise BusyError."""
        with self._changed:
            if self._closed or self._count_waiting() >= self.max_waiting:
                raise BusyError(self.retry_after())
            self._waiting.append(job)
            self._changed.notify()

    def retry_after(self) -> int:
        """Whole seconds until half of the line is gone, at the pace of the last jobs."""
        return max(1, math.ceil(self.max_waiting / 2 * self._seconds_per_job))

    def close(self) -> None:
        """End the thread; whoever waits is told."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._running):
                job.cancel()
            self._changed.notify()
        self._thread.join(30)

    def _count_waiting(self) -> int:
        return sum(job.stopped is None for job in self._waiting)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = []
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._running = self._next_batch()
            began = time.monotonic()
            _answer(self._running)
            seconds, turns = time.monotonic() - began, len(self._running)
            self._seconds_per_job += 0.2 * (seconds / turns - self._seconds_per_job)
            self._on_batch(turns, seconds)

    def _next_batch(self) -> list[Job]:
        """The first job and those behind it that can be answered with it."""
        first = self._waiting.popleft()
        batch = [first]
        for job in list(self._waiting):
            if len(batch) == self.max_batch:
                break
            together = job.conversation.speaker is first.conversation.speaker
            if together and all(job.conversation is not other.conversation for other in batch):
                self._waiting.remove(job)
                batch.append(job)
        return batch


def _answer(jobs: Sequence[Job]) -> None:
    """Answer every job, together; those that another one's failure silenced, alone."""
    ready: list[tuple[Job, Turn]] = []
    for job in jobs:
        turn = _prepare(job)
        if turn is not None:
            ready.append((job, turn))
    unfinished = {index: job for index, (job, _) in enumerate(ready)}
    try:
        for index, event in stream_together([turn for _, turn in ready]):
            job = ready[index][0]
            if isinstance(event, Ended):
                del unfinished[index]
                stop = job.stopped if event.reason == "cancelled" else None
                _tell(job, event if stop is None else _failed(stop))
            else:
                job._said |= isinstance(event, Text | RetrievedImage | GeneratedImage)
                _tell(job, event)
    except Exception as error:  # whatever one batch does, the next one is answered
        _log.exception("%d turns could not be answered", len(unfinished))
        left = list(unfinished.values())
        for job in left:
            if len(ready) > 1 and not job._said:
                _answer([job])
            else:
                refused = isinstance(error, ConversationError)
                _tell(job, _failed("refused", str(error)) if refused else _failed("broken"))


def _prepare(job: Job) -> Turn | None:
    if job.stopped is not None:
        _tell(job, _failed(job.stopped))
        return None
    try:
        return job.conversation.prepare(
            job.parts(), job.settings, cancelled=lambda: job.stopped is not None
        )
    except ConversationError as error:
        _tell(job, _failed("refused", str(error)))
    except Exception:
        _log.exception("a turn could not be read")
        _tell(job, _failed("broken"))
    return None


def _failed(stop: Stop, reason: str = "") -> Failed:
    reasons = {
        "left": "stopped",
        "late": "the answer took too long",
        "broken": "this could not be answered; the log says why",
    }
    return Failed(stop, reason or reasons[stop])


def _tell(job: Job, event: Event | Failed) -> None:
    try:
        job.listen(event)
    except Exception:  # its listener is gone, for example a closed event loop
        _log.debug("nobody listens", exc_info=True)
        job.cancel()
