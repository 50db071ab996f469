"""POST /v1/chat/completions: what is answered, at once or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from app.serving.answer_pictures import PictureNames, about
from app.serving.answering import Answer
from app.serving.chat_requests import ChatRequest
from app.serving.request_errors import RequestError, error_body
from pipeline.talking.answers import Ended, PictureProgress, Started, Text


class ChatAnswer:
    """One answer in OpenAI's shape, with its pictures in `parts` and in `images`."""

    def __init__(self, asked: ChatRequest, model: str, answer: Answer, names: PictureNames) -> None:
        self._answer, self._names = answer, names
        self._with_usage = asked.stream_options is not None and bool(
            asked.stream_options.include_usage
        )
        self._with_words = set(asked.modalities or ()) != {"image"}
        self._common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self) -> dict[str, Any]:
        """Everything in one object."""
        reply = await self._answer.whole()
        content, parts = "", list[dict[str, Any]]()
        images: list[dict[str, Any]] = []
        for piece in reply:
            if isinstance(piece, Text):
                if not self._with_words:
                    continue
                content += piece.text
                parts.append({"type": "text", "text": piece.text})
            else:
                url = await self._names.url(piece.picture)
                content += self._names.markdown(piece, url)
                parts.append(_picture(url, about(piece)))
                images.append({**parts[-1], "index": len(images)})
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content,
            "refusal": None,
            "parts": parts,
        }
        if images:
            message["images"] = images
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": finish_reason(self._answer.end),
            "logprobs": None,
        }
        used = usage(self._answer)
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": used}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: pieces as they come, denoising steps as comments."""
        try:
            async for event in self._pieces():
                yield event
        except RequestError as error:
            yield _event(error_body(error))

    async def _pieces(self) -> AsyncIterator[str]:
        yield self._chunk({"role": "assistant", "content": ""})
        number = 0
        async for event in self._answer.events():
            if isinstance(event, Text):
                if self._with_words:
                    yield self._chunk({"content": event.text})
            elif isinstance(event, PictureProgress):
                yield f": step {event.step} of {event.steps}\n\n"
            elif not isinstance(event, Started | Ended):
                url = await self._names.url(event.picture)
                # By its index a client puts a piece of a list where it belongs.
                picture = {**_picture(url, about(event)), "index": number}
                number += 1
                if link := self._names.markdown(event, url):
                    yield self._chunk({"content": link})
                yield self._chunk({"parts": [picture], "images": [picture]})
        yield self._chunk({}, finish_reason(self._answer.end))
        if self._with_usage:
            used = {"choices": [], "usage": usage(self._answer)}
            yield _event({**self._common, "object": "chat.completion.chunk", **used})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event({**self._common, "object": "chat.completion.chunk", "choices": [choice]})


def finish_reason(end: Ended) -> str:
    """OpenAI's word for why an answer ended: an answer may end with its picture."""
    return "length" if end.reason in ("max_tokens", "max_positions") else "stop"


def usage(answer: Answer) -> dict[str, Any]:
    """Positions of the language model: k per picture read, r per picture said."""
    read, said = answer.started.prompt_tokens, answer.end.tokens
    return {
        "prompt_tokens": read,
        "completion_tokens": said,
        "total_tokens": read + said,
        "prompt_tokens_details": {"cached_tokens": answer.started.cached_tokens},
        "forgotten_exchanges": answer.forgotten,
    }


def _picture(url: str, told: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, "gill": told}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
