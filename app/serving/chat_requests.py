"""POST /v1/chat/completions: what is asked.

A language model that continues texts reads messages one after the other as one text with pictures,
whatever their roles; a chat model reads them in the turns of their roles. An answer may be sent
back as it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue

from app.serving.requests import AnswerRequest, Modality, OnlyFalse, OnlyOne, Shape
from app.serving.settings import RequestLimits
from app.serving.turn_reading import PictureAddress, SentPart
from gill.loading import Gill
from pipeline.talking.answers import ReplySettings, Side

_LINKED_PICTURE = re.compile(r"\s?!\[[^\]\n]*\]\((\S*/v1/pictures/[A-Za-z0-9_-]{32}\.png)\)")
"""A picture of an answer in Markdown, as `pictures: markdown` writes it."""


SIDES = {"system": Side.SYSTEM, "developer": Side.SYSTEM, "assistant": Side.ASSISTANT}
"""Who speaks in a role; in all others the user does."""


class TextPart(Shape):
    """Words."""

    type: Literal["text"]
    text: str


class ImageUrl(Shape):
    """An address: a data URI, a picture of an answer, or on an allowed host."""

    url: str


class About(BaseModel):
    """What an answer said about its picture: the row of a retrieved one is read."""

    row: int | None = None


class ImagePart(Shape):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl | str
    index: int | None = Field(None, description="of the pictures of an answer; not read")
    gill: About | None = None


class RefusalPart(Shape):
    """What a model has refused to say; it is not read."""

    type: Literal["refusal"]


ContentPart = Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]


class ChatMessage(Shape):
    """`parts` and `images` are those of an answer that is sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    parts: list[ContentPart] | None = None
    images: list[ImagePart] | None = None


class StreamOptions(Shape):
    """What a stream ends with."""

    include_usage: bool | None = None


class PlainText(Shape):
    """No JSON and no schema: nothing here keeps to one."""

    type: Literal["text"]


class ChatRequest(AnswerRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    stop: str | list[str] | None = None
    top_k: int | None = Field(None, ge=-1, description="-1 and 0: among all tokens")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=1, le=1000)
    modalities: list[Modality] | None = Field(None, min_length=1)
    stream_options: StreamOptions | None = None
    # Accepted where they ask for what is done anyway.
    n: OnlyOne | None = None
    logprobs: OnlyFalse | None = None
    response_format: PlainText | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    metadata: dict[str, JsonValue] | None = None

    def reply_settings(self, gill: Gill, limits: RequestLimits) -> ReplySettings:
        """How to answer. Raises RequestError as `settings` does."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return self.settings(
            gill,
            limits,
            self.modalities or (),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            seed=self.seed,
            stop=None if stop is None else tuple(stop),
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
        )

    def exchanges(self) -> list[list[SentPart]]:
        """What people said with the answers to it; the last is the turn to answer."""
        exchanges: list[list[SentPart]] = [[]]
        before = ""
        for number, message in enumerate(self.messages):
            if before == "assistant" != message.role:
                exchanges.append([])
            exchanges[-1].append(SIDES.get(message.role, Side.USER))
            exchanges[-1] += _parts(message, f"messages.{number}")
            before = message.role
        return exchanges

    def rows(self) -> list[int]:
        """Rows of the pictures that were retrieved in answers before."""
        shown = [
            part
            for message in self.messages
            for part in (*(message.parts or ()), *(message.images or ()))
        ]
        rows = [part.gill.row for part in shown if isinstance(part, ImagePart) and part.gill]
        return [row for row in dict.fromkeys(rows) if row is not None]


def _parts(message: ChatMessage, where: str) -> Iterator[SentPart]:
    """What is read of a message. Of an answer that is its words: see `Conversation`."""
    if message.role == "assistant":
        yield from _words(message)
        return
    if isinstance(message.content, str):
        yield from filter(None, [message.content])
    else:
        yield from _content(message.content or (), f"{where}.content")
    yield from _content(message.parts or (), f"{where}.parts")
    yield from _content(message.images or (), f"{where}.images")


def _words(message: ChatMessage) -> Iterator[str]:
    if isinstance(message.content, str):
        yield from filter(None, [_LINKED_PICTURE.sub("", message.content)])
    else:
        for part in message.content or message.parts or ():
            if isinstance(part, TextPart) and part.text:
                yield part.text


def _content(parts: Sequence[ContentPart], where: str) -> Iterator[SentPart]:
    for place, part in enumerate(parts):
        if isinstance(part, TextPart):
            if part.text:
                yield part.text
        elif isinstance(part, ImagePart):
            url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            yield PictureAddress(url, f"{where}.{place}")
