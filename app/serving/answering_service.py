"""One model and one worker, for all who ask over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from app.page.kept_pictures import KeptPictures
from app.serving.answer_pictures import PictureNames
from app.serving.answering import Answer
from app.serving.job import Job
from app.serving.metrics import ServiceMetrics
from app.serving.request_errors import Json, RequestError, busy
from app.serving.requests import AnswerRequest, IgnoredFields
from app.serving.seen_pictures import SeenPictures
from app.serving.settings import ServiceSettings
from app.serving.turn_reading import SentPart, Told, TurnReader, take_system_prompt
from app.serving.worker import BusyError, Worker
from gill.loading import Gill
from pipeline.talking.answers import (
    ConversationError,
    ReplySettings,
    SeenPart,
    Side,
    ToldPart,
)
from pipeline.talking.conversation import Conversation
from pipeline.talking.prefixes import Prefixes


class AnsweringService:
    """What requests share: the model, its worker, and what is known from the requests before."""

    def __init__(self, gill: Gill, settings: ServiceSettings) -> None:
        self.gill, self.settings = gill, settings
        self.metrics = ServiceMetrics()
        self.worker = Worker(settings.max_waiting, settings.max_batch, self.metrics.on_batch)
        self.metrics.watch(self.worker)
        self.kept = KeptPictures(settings.picture_seconds, settings.picture_bytes)
        self.places = settings.max_requests
        self._seen = SeenPictures(settings.seen_pictures)
        self._prefixes = Prefixes(settings.prefix_bytes)
        self._reader = TurnReader(settings.limits, settings.remote, self.kept, self._seen)
        self._ignored = IgnoredFields()

    def check(self, asked: AnswerRequest) -> None:
        """Note what is ignored, and raise RequestError for another model."""
        self.metrics.ignored_fields.inc(self._ignored.note(asked))
        if asked.model not in (None, self.settings.model):
            known = f"the model here is {self.settings.model!r}"
            raise RequestError(
                f"no model {asked.model!r}; {known}",
                param="model",
                status=404,
                code="model_not_found",
            )

    async def ask(
        self,
        request: Request,
        exchanges: Sequence[Sequence[SentPart]],
        settings: Sequence[ReplySettings],
        shown: Sequence[int] = (),
    ) -> list[Answer]:
        """Put the last of the exchanges in the line, once for each of `settings`.

        `shown`: rows that are not retrieved again. RequestError where it cannot be read, or there
        is no room in the line.
        """
        system_prompt = None
        if self.gill.language_model.turns is not None:
            system_prompt, exchanges = take_system_prompt(exchanges, self.settings.limits)
        told = await self._reader.read(exchanges)
        deadline = time.monotonic() + self.settings.timeout_s
        answers, jobs = [], []
        for one in settings:
            answer = Answer(self.metrics, deadline, self.worker.retry_after, told.forgotten)
            try:
                conversation = self.gill.conversation(self._prefixes, system_prompt=system_prompt)
            except ConversationError as error:
                raise RequestError(str(error), param="messages") from None
            rows = 0 if self.gill.index is None else len(self.gill.index)
            conversation.shown = [row for row in shown if 0 <= row < rows]
            parts = _Recalled(conversation, told, self._seen, self.gill)
            jobs.append(Job(conversation, parts, one, answer.listen, deadline))
            answers.append(answer)
        request.scope["gill.jobs"].extend(jobs)
        try:
            self.worker.submit(*jobs)
        except BusyError as error:
            raise busy(error.retry_after) from None
        return answers

    def names(self, request: Request, asked: AnswerRequest) -> PictureNames:
        """Names for the pictures of an answer, as the request wants them."""
        return PictureNames(self.kept, str(request.base_url), asked.pictures or "data")

    async def respond(
        self,
        request: Request,
        answers: Sequence[Answer],
        whole: Callable[[], Awaitable[Any]],
        events: Callable[[], AsyncIterator[str]] | None = None,
    ) -> Response:
        """`events` as they come where they are asked for, or the `whole`; and nothing to a client
        who has left."""
        watch = asyncio.create_task(_leave_with(request.receive, answers))
        try:
            for answer in answers:
                await answer.start()
            if events is None:
                return Json(await whole())
        finally:
            watch.cancel()
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def _leave_with(receive: Callable[[], Awaitable[Message]], answers: Sequence[Answer]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    for answer in answers:
        answer.leave()


class _Recalled:
    """The parts of a turn, in a conversation that has recalled what was told before it."""

    def __init__(
        self, conversation: Conversation, told: Told, seen: SeenPictures, gill: Gill
    ) -> None:
        self._conversation, self._told, self._seen, self._gill = conversation, told, seen, gill
        self._parts: list[SeenPart] | None = None

    def __call__(self) -> list[SeenPart]:
        if self._parts is None:
            exchanges = [*self._told.history, self._told.turn]
            *history, turn = (self._seen.encode(one, self._gill.encoder) for one in exchanges)
            in_turns = self._gill.language_model.turns is not None
            if in_turns:
                before, turn = _user_turn(turn)
                history.append(before)
            for exchange in history:
                self._conversation.recall(exchange if in_turns else _without_sides(exchange))
            self._parts = _without_sides(turn)
        return self._parts


def _without_sides(parts: Sequence[ToldPart]) -> list[SeenPart]:
    return [part for part in parts if not isinstance(part, Side)]


def _user_turn(parts: list[ToldPart]) -> tuple[list[ToldPart], list[ToldPart]]:
    """What the user says last, and what is before it. ConversationError where nobody does."""
    sides = [i for i, part in enumerate(parts) if isinstance(part, Side)]
    others = [i for i in sides if parts[i] is not Side.USER]
    if others and sides[-1] == others[-1]:
        raise ConversationError("the last message is not the user's: only that is answered")
    first = next((i for i in sides if not others or i > others[-1]), 0)
    return parts[:first], parts[first:]
