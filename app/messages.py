"""Requests and answers in the shape of OpenAI's chat completions, with pictures in both directions.

    ChatRequest -> read_turn -> [text, bytes of a picture, ...] -> Turn of a conversation
    events of the conversation -> content (words), parts (words and pictures in their order)

Every request tells the whole conversation; its messages are read one after the other as one text
with pictures, as the language model was trained, whatever their roles.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from app.encoded_pictures import as_png
from corpora.pictures import PictureError, open_picture
from gill_errors import InputError
from pipeline.talking.answers import GeneratedImage, Part, ReplySettings, RetrievedImage
from pipeline.talking.decoding import EndReason
from pipeline.talking.remote_pictures import (
    RemotePictureError,
    RemotePictureSettings,
    fetch_picture,
)


class RequestError(InputError):
    """A request that cannot be served as it is: the status, the reason, and the field at fault."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        self.param, self.status = param, status
        super().__init__(message)


class RequestLimits(BaseModel):
    """How much one request may ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body_bytes: int = Field(16_000_000, ge=1, description="bytes of a request")
    max_messages: int = Field(256, ge=1, description="messages of a request")
    max_characters: int = Field(20_000, ge=1, description="characters of all its texts")
    max_pictures: int = Field(8, ge=0, description="pictures in it")
    max_pixels: int = Field(32_000_000, ge=1, description="pixels of all its pictures")
    max_tokens: int = Field(256, ge=1, description="tokens of an answer")
    max_images: int = Field(4, ge=0, description="pictures in an answer")
    max_candidates: int = Field(4, ge=1, description="pictures generated for one that is shown")
    max_steps: int = Field(100, ge=1, description="denoising steps of a picture")
    max_guidance: float = Field(50.0, ge=1, description="guidance of a picture")


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextPart(_Shape):
    type: Literal["text"]
    text: str


class ImageUrl(_Shape):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Shape):
    """`gill` is what an answer said about a picture; it may be sent back and is not read."""

    type: Literal["image_url"]
    image_url: ImageUrl
    gill: JsonValue = None


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Shape):
    """`parts` are those of an answer that is sent back: they are read instead of `content`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    parts: list[ContentPart] | None = None
    name: str | None = None
    # What the client library adds to an answer that is sent back.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(_Shape):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(_Shape):
    """The body of POST /v1/chat/completions. `gill` holds this project's own knobs by name."""

    model: str
    messages: list[Message] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    pictures: Literal["data", "url"] = Field(
        "data", description="pictures of the answer as data URIs, or under names that expire"
    )
    gill: dict[str, JsonValue] = Field(default_factory=dict)
    # Accepted where they ask for what is done anyway.
    n: Literal[1] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logprobs: Literal[False] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, JsonValue] | None = None
    store: bool | None = None

    def knobs(self) -> dict[str, JsonValue]:
        """Everything about how to answer, by the names of the reply settings."""
        standard = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "seed": self.seed,
        }
        given: dict[str, JsonValue] = {k: v for k, v in standard.items() if v is not None}
        return {**self.gill, **given}


def check_settings(settings: ReplySettings, limits: RequestLimits) -> None:
    """Raise RequestError where an answer would be longer or dearer than allowed."""
    decoding, generation = settings.decoding, settings.generation
    highest = {
        "max_tokens": (decoding.max_tokens, limits.max_tokens),
        "max_images": (decoding.max_images, limits.max_images),
        "candidates": (settings.candidates, limits.max_candidates),
    }
    if generation is not None:
        highest["steps"] = (generation.steps, limits.max_steps)
        highest["guidance"] = (generation.guidance, limits.max_guidance)  # type: ignore[assignment]
    for name, (value, limit) in highest.items():
        if value > limit:
            raise RequestError(f"{name} is {value}, at most {limit} here", param=name)
    if len(settings.negative_prompt) > limits.max_characters:
        raise RequestError("negative_prompt is too long", param="negative_prompt")


def read_turn(
    messages: Sequence[Message], limits: RequestLimits, remote: RemotePictureSettings
) -> list[str | bytes]:
    """All parts of a conversation in their order; pictures as bytes that are known to decode.

    Pictures are decoded here, once, to refuse what is broken or too large, and not kept: what waits
    in line is as small as what was sent. RequestError names the part.
    """
    if len(messages) > limits.max_messages:
        raise RequestError(f"{len(messages)} messages, at most {limits.max_messages}")
    turn: list[str | bytes] = []
    characters = pictures = pixels = 0
    for number, message in enumerate(messages):
        for place, part in enumerate(_parts(message)):
            where = f"messages[{number}].content[{place}]"
            if isinstance(part, TextPart):
                characters += len(part.text)
                if characters > limits.max_characters:
                    raise RequestError(
                        f"more than {limits.max_characters} characters of text", param=where
                    )
                if part.text:
                    turn.append(part.text)
                continue
            pictures += 1
            if pictures > limits.max_pictures:
                raise RequestError(f"more than {limits.max_pictures} pictures", param=where)
            left = limits.max_pixels - pixels
            data = _picture_bytes(part.image_url.url, where, left, remote)
            try:
                picture = open_picture(data, max_pixels=max(left, 0))
            except PictureError as error:
                raise RequestError(f"{error.kind}: {error.detail}", param=where) from error
            pixels += picture.width * picture.height
            turn.append(data)
    if not turn:
        raise RequestError("the messages are empty: say something or show a picture")
    return turn


def decode_turn(turn: Sequence[str | bytes]) -> list[Part]:
    """What `read_turn` returned, with its pictures opened."""
    return [part if isinstance(part, str) else open_picture(part) for part in turn]


def picture_part(picture: RetrievedImage | GeneratedImage, url: str) -> dict[str, Any]:
    """A picture of an answer as a content part, saying where it comes from."""
    about: dict[str, Any] = {"p_generate": picture.generate_probability}
    if isinstance(picture, RetrievedImage):
        about |= {"kind": "retrieved", "score": picture.score, "source": picture.source}
        about |= {"caption": picture.caption, "row": picture.row}
    else:
        about |= {"kind": "generated", "seed": picture.seed, "steps": picture.steps}
        about |= {"guidance": picture.guidance, "scheduler": picture.scheduler}
    return {"type": "image_url", "image_url": {"url": url}, "gill": about}


def text_part(text: str) -> dict[str, Any]:
    """Words of an answer as a content part."""
    return {"type": "text", "text": text}


def finish_reason(reason: EndReason) -> str:
    """OpenAI's word for why an answer ended."""
    return "stop" if reason == "stop" else "length"


def completion(
    name: str, model: str, parts: Sequence[dict[str, Any]], reason: str, usage: dict[str, int]
) -> dict[str, Any]:
    """The whole answer."""
    content = "".join(part["text"] for part in parts if part["type"] == "text")
    message = {"role": "assistant", "content": content, "parts": list(parts)}
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    return {
        "id": name,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def chunk(
    name: str, model: str, created: int, delta: dict[str, Any], reason: str | None = None
) -> dict[str, Any]:
    """One piece of a streamed answer."""
    return {
        "id": name,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}],
    }


def usage(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """Positions of the language model: k per picture read, r per picture said."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }


def _parts(message: Message) -> Sequence[TextPart | ImagePart]:
    if message.parts is not None:
        return message.parts
    if isinstance(message.content, str):
        return [TextPart(type="text", text=message.content)]
    return message.content or []


def _picture_bytes(url: str, where: str, max_pixels: int, remote: RemotePictureSettings) -> bytes:
    if url[:5].lower() == "data:":
        head, comma, body = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RequestError("a data URI must read data:image/...;base64,...", param=where)
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"the data URI is not base64: {error}", param=where) from error
    if not remote.allowed_hosts:
        raise RequestError(
            "only data URIs are read here: addresses are not fetched (no host is allowed)",
            param=where,
        )
    allowed = remote.model_copy(update={"max_pixels": min(remote.max_pixels, max(max_pixels, 1))})
    try:
        picture = fetch_picture(url, allowed)
    except RemotePictureError as error:
        raise RequestError(str(error), param=where) from error
    return as_png(picture)
