"""The way of an answer, from the worker's events to the client who asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from app.serving.job import Failed
from app.serving.metrics import ServiceMetrics
from app.serving.request_errors import busy, failure
from pipeline.talking.answers import (
    Ended,
    Event,
    GeneratedImage,
    Reply,
    RetrievedImage,
    Started,
    Text,
)


class Answer:
    """One answer, event by event, with a deadline on the clock of `time.monotonic`."""

    def __init__(
        self,
        metrics: ServiceMetrics,
        deadline: float,
        retry_after: Callable[[], int],
        beyond_limits: int,
    ) -> None:
        self._metrics, self._deadline, self._retry_after = metrics, deadline, retry_after
        self._beyond_limits = beyond_limits
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Failed] = asyncio.Queue()
        self._said = self._ended = False
        self.started = Started(0, 0)
        self.end = Ended("stop", 0)

    @property
    def forgotten(self) -> int:
        """Oldest exchanges that were not read."""
        return self._beyond_limits + self.started.forgotten_turns

    def listen(self, event: Event | Failed) -> None:
        """Called by the worker's threads."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def leave(self) -> None:
        """The client has left."""
        self._events.put_nowait(Failed.because("left"))

    async def start(self) -> None:
        """Wait until the turn is being answered. RequestError where that does not come to be."""
        event = await self._next()
        if isinstance(event, Failed):
            raise busy(self._retry_after()) if event.stop == "late" else failure(event)
        assert isinstance(event, Started)
        self.started = event

    async def events(self) -> AsyncIterator[Event]:
        """What comes after the start, up to the end, which is in `end`. RequestError where it
        comes to nothing."""
        try:
            while True:
                event = await self._next()
                if isinstance(event, Failed):
                    raise failure(event)
                if isinstance(event, Ended):
                    self.end = event
                    return
                yield event
        finally:
            if not self._ended:
                self._count(Failed.because("left"))

    async def whole(self) -> Reply:
        """All that comes after the start."""
        reply = Reply()
        async for event in self.events():
            reply.add(event)
        return reply

    async def _next(self) -> Event | Failed:
        """The next event; a little after the deadline, that it is over."""
        try:
            async with asyncio.timeout(max(self._deadline + 1 - time.monotonic(), 0)):
                event = await self._events.get()
        except TimeoutError:
            event = Failed.because("late")
        self._count(event)
        return event

    def _count(self, event: Any) -> None:
        metrics = self._metrics
        self._ended |= isinstance(event, Ended | Failed)
        match event:
            case Started():
                metrics.tokens.labels("read").inc(event.prompt_tokens - event.cached_tokens)
                metrics.tokens.labels("known").inc(event.cached_tokens)
            case RetrievedImage():
                metrics.pictures.labels("retrieved").inc()
            case GeneratedImage():
                metrics.pictures.labels("generated").inc()
            case Ended():
                metrics.tokens.labels("said").inc(event.tokens)
                metrics.ended.labels(event.reason).inc()
            case Failed():
                metrics.ended.labels(event.stop).inc()
        if not self._said and isinstance(event, Text | RetrievedImage | GeneratedImage):
            self._said = True
            metrics.first_piece.observe(time.monotonic() - self._began)
