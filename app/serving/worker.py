"""Answers for everybody: the model is shared, its users wait in a bounded line.

    submit(Job) -> waiting line -> Batch of jobs -> events to each job's listener

Whatever waits when the model gets free is answered together, up to `max_batch` turns. A listener
hears the conversation's events and, at the end, `Ended` or `Failed`, exactly one of them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from app.serving.job import Failed, Job
from pipeline.talking.answers import Ended, Event
from pipeline.talking.batch import Batch, paint_together

_log = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """The waiting line is full; `retry_after` (seconds) is when it is likely to have room."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"too many requests are waiting: try again in {retry_after} s")


class Worker:
    """The threads and their waiting line. `on_batch(turns, seconds)` hears of every batch whose
    words are said.

    One thread says words, another makes the pictures that answers wait for: who wants words alone
    waits for nobody's picture.
    """

    def __init__(
        self,
        max_waiting: int = 32,
        max_batch: int = 8,
        on_batch: Callable[[int, float], None] = lambda turns, seconds: None,
    ) -> None:
        self.max_waiting, self.max_batch = max_waiting, max_batch
        self._on_batch = on_batch
        self._waiting: deque[Job] = deque()
        self._speaking: list[Job] = []
        self._unpainted: list[_Answering] = []
        self._painting: list[_Answering] = []
        self._changed = threading.Condition()
        self._closed = self._silent = False
        self._seconds_per_job = 0.5
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("answers", self._speak), ("pictures", self._paint))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether submitted jobs will be answered."""
        return all(thread.is_alive() for thread in self._threads) and not self._closed

    @property
    def num_waiting(self) -> int:
        """Jobs that nobody works on and somebody still waits for."""
        with self._changed:
            return self._count_waiting()

    @property
    def num_running(self) -> int:
        """Jobs being answered."""
        return len(self._speaking) + self.num_painting

    @property
    def num_painting(self) -> int:
        """Those of them whose pictures are being made."""
        return sum(len(answering.unfinished) for answering in self._painting)

    def submit(self, *jobs: Job) -> None:
        """Put the jobs in the line, or, where they do not all find room, raise BusyError."""
        with self._changed:
            if self._closed or self._count_waiting() + len(jobs) > self.max_waiting:
                raise BusyError(self.retry_after())
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def retry_after(self) -> int:
        """Whole seconds until half of the line is gone, at the pace of the last jobs."""
        return max(1, math.ceil(self.max_waiting / 2 * self._seconds_per_job))

    def close(self) -> None:
        """End the threads; whoever waits is told."""
        with self._changed:
            self._closed = True
            unpainted = [job for one in (*self._unpainted, *self._painting) for job in one.jobs]
            for job in (*self._waiting, *self._speaking, *unpainted):
                job.cancel()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(30)

    def _count_waiting(self) -> int:
        unpainted = [job for one in self._unpainted for job in one.unfinished.values()]
        return sum(job.stopped is None for job in (*self._waiting, *unpainted))

    def _speak(self) -> None:
        while True:
            with self._changed:
                self._speaking = []
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    self._silent = True
                    self._changed.notify_all()
                    return
                self._speaking = self._next_batch()
            began, turns = time.monotonic(), len(self._speaking)
            answering = _Answering(self._speaking)
            self._try_again(_hear_all([answering], answering.words()))
            if answering.unfinished:
                with self._changed:
                    self._unpainted.append(answering)
                    self._changed.notify_all()
            self._note(turns, time.monotonic() - began)
            self._on_batch(turns, time.monotonic() - began)

    def _paint(self) -> None:
        while True:
            with self._changed:
                self._painting = []
                self._changed.wait_for(lambda: self._unpainted or self._silent)
                if not self._unpainted:
                    return
                first = self._unpainted[0]
                self._painting = [one for one in self._unpainted if first.may_paint_with(one)]
                self._unpainted = [one for one in self._unpainted if one not in self._painting]
            began, turns = time.monotonic(), self.num_painting
            pictures = paint_together([answering.batch for answering in self._painting])
            self._try_again(_hear_all(self._painting, pictures))
            for answering in self._painting:
                self._go_on(answering)
            self._note(turns, time.monotonic() - began)

    def _go_on(self, answering: _Answering) -> None:
        """The words behind pictures that are read back, and what these wait for."""
        if answering.unfinished and not answering.batch.has_spoken:
            self._try_again(_hear_all([answering], answering.words()))
            if answering.unfinished:
                with self._changed:
                    self._unpainted.append(answering)

    def _note(self, turns: int, seconds: float) -> None:
        self._seconds_per_job += 0.2 * (seconds / turns - self._seconds_per_job)

    def _try_again(self, jobs: Sequence[Job]) -> None:
        """Those that another one's failure silenced are next, each alone."""
        with self._changed:
            for job in reversed(jobs):
                job.alone = True
                if self._silent:
                    job.tell(Failed.because("left"))
                else:
                    self._waiting.appendleft(job)
            self._changed.notify_all()

    def _next_batch(self) -> list[Job]:
        """The first job and those behind it that can be answered with it."""
        first = self._waiting.popleft()
        batch = [first]
        for job in list(self._waiting):
            if len(batch) == self.max_batch or first.alone:
                break
            together = job.conversation.speaker is first.conversation.speaker and not job.alone
            if together and all(job.conversation is not other.conversation for other in batch):
                self._waiting.remove(job)
                batch.append(job)
        return batch


class _Answering:
    """Jobs being answered together; `unfinished` are those that were not told their end."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        ready = [(job, turn) for job in jobs if (turn := job.prepare()) is not None]
        self.jobs = [job for job, _ in ready]
        self.batch = Batch([turn for _, turn in ready])
        self.unfinished = dict(enumerate(self.jobs))

    def words(self) -> Iterator[tuple[Batch, int, Event]]:
        """What the batch says until it waits for pictures."""
        return ((self.batch, index, event) for index, event in self.batch.speak())

    def may_paint_with(self, other: _Answering) -> bool:
        """Whether the pictures of both may be made in one go."""
        if other is self:
            return True
        alone = any(job.alone for job in (*self.jobs, *other.jobs))
        return other.batch.speaker is self.batch.speaker and not alone

    def hear(self, index: int, event: Event) -> None:
        """Pass an event on."""
        job = self.jobs[index]
        if isinstance(event, Ended):
            del self.unfinished[index]
            stop = job.stopped if event.reason == "cancelled" else None
            job.tell(event if stop is None else Failed.because(stop))
        else:
            job.tell(event)

    def fail(self, error: Exception, *, alone: bool) -> list[Job]:
        """Those jobs that are to be tried again; the others are told."""
        self.batch.close()
        again = []
        for job in self.unfinished.values():
            if not alone and not job.has_spoken:
                again.append(job)
            else:
                job.tell(Failed.after(error))
        self.unfinished.clear()
        return again


def _hear_all(
    answerings: Sequence[_Answering], events: Iterator[tuple[Batch, int, Event]]
) -> list[Job]:
    """Pass the events on; gives the jobs that are to be tried again, each alone."""
    owners = {id(answering.batch): answering for answering in answerings}
    try:
        for batch, index, event in events:
            owners[id(batch)].hear(index, event)
        return []
    except Exception as error:  # whatever one batch does, the next one is answered
        left = sum(len(answering.unfinished) for answering in answerings)
        _log.exception("%d turns could not be answered", left)
        alone = sum(len(answering.jobs) for answering in answerings) == 1
        return [job for answering in answerings for job in answering.fail(error, alone=alone)]
