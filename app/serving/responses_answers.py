"""POST /v1/responses: what is answered, at once or as its stream of events."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from app.encoded_pictures import as_png
from app.serving.answer_pictures import about
from app.serving.answering import Answer
from app.serving.request_errors import RequestError, error_body
from app.serving.responses_requests import ResponseRequest
from pipeline.talking.answers import GeneratedImage, PictureProgress, RetrievedImage, Text


class ResponseAnswer:
    """One answer: messages of words, and `image_generation_call` items, in their order."""

    def __init__(self, asked: ResponseRequest, model: str, answer: Answer) -> None:
        self._answer = answer
        self._common: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "auto",
        }
        self._output: list[dict[str, Any]] = []
        self._number = 0

    async def whole(self) -> dict[str, Any]:
        """Everything in one object."""
        async for _ in self._tell():
            pass
        return self._response(self._status())

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, each numbered."""
        try:
            for kind in ("response.created", "response.in_progress"):
                yield self._event(kind, response=self._response("in_progress"))
            async for kind, fields in self._tell():
                yield self._event(kind, **fields)
            status = self._status()
            yield self._event(f"response.{status}", response=self._response(status))
        except RequestError as error:
            told = error_body(error)["error"]
            code = told["code"] or told["type"]
            failed = {**self._response("failed"), "error": {"code": code, **_message(told)}}
            yield self._event("response.failed", response=failed)

    async def _tell(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The answer, kind by kind; what is told is in `_output`."""
        text: dict[str, Any] | None = None
        painting: str | None = None
        item: dict[str, Any]
        async for event in self._answer.events():
            place = {"output_index": len(self._output)}
            if isinstance(event, Text):
                if text is None:
                    text = {**_message_item(""), "status": "in_progress"}
                    yield "response.output_item.added", {**place, "item": {**text, "content": []}}
                    part = {"item_id": text["id"], **place, "content_index": 0}
                    yield "response.content_part.added", {**part, "part": _words("")}
                text["content"][0]["text"] += event.text
                delta = {"delta": event.text, "logprobs": []}
                yield "response.output_text.delta", {**part, **delta}
                continue
            if text is not None:
                async for told in self._end(text, part):
                    yield told
                text, place = None, {"output_index": len(self._output)}
            if isinstance(event, PictureProgress | RetrievedImage | GeneratedImage):
                if painting is None:
                    painting = f"ig_{secrets.token_hex(16)}"
                    item = {"id": painting, "type": "image_generation_call", "result": None}
                    added = {**item, "status": "in_progress"}
                    yield "response.output_item.added", {**place, "item": added}
                    call = {"item_id": painting, **place}
                    yield "response.image_generation_call.in_progress", call
                    yield "response.image_generation_call.generating", call
                if not isinstance(event, PictureProgress):
                    png = await asyncio.to_thread(as_png, event.picture)
                    done = {"status": "completed", "result": base64.b64encode(png).decode()}
                    item = {**item, **done, "output_format": "png", "gill": about(event)}
                    self._output.append(item)
                    yield "response.image_generation_call.completed", call
                    yield "response.output_item.done", {**place, "item": item}
                    painting = None
        if text is not None:
            async for told in self._end(text, part):
                yield told

    async def _end(
        self, item: dict[str, Any], place: dict[str, Any]
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The end of a message."""
        [words] = item["content"]
        done = {**item, "status": "completed"}
        self._output.append(done)
        yield "response.output_text.done", {**place, "text": words["text"], "logprobs": []}
        yield "response.content_part.done", {**place, "part": words}
        yield "response.output_item.done", {"output_index": place["output_index"], "item": done}

    def _status(self) -> str:
        cut = self._answer.end.reason in ("max_tokens", "max_positions")
        return "incomplete" if cut else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        told = {"status": status, "error": None, "incomplete_details": cut}
        read, said = self._answer.started.prompt_tokens, self._answer.end.tokens
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": self._answer.started.cached_tokens},
            "output_tokens": said,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + said,
            "forgotten_exchanges": self._answer.forgotten,
        }
        ended = status in ("completed", "incomplete")
        return {
            **self._common,
            **told,
            "output": list(self._output),
            "usage": usage if ended else None,
        }

    def _event(self, kind: str, **fields: Any) -> str:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _message_item(text: str) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(16)}",
        "type": "message",
        "role": "assistant",
        "content": [_words(text)],
    }


def _words(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(error: dict[str, Any]) -> dict[str, str]:
    return {"message": error["message"]}
