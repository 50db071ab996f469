"""POST /v1/images/generations: pictures of a prompt."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from app.encoded_pictures import as_png
from app.serving.answer_pictures import PictureNames, about
from app.serving.answering import Answer
from app.serving.request_errors import RequestError
from app.serving.requests import AnswerRequest, OnlyFalse
from app.serving.settings import RequestLimits
from gill.loading import Gill
from pipeline.talking.answers import ReplySettings


class ImageRequest(AnswerRequest):
    """The body of POST /v1/images/generations."""

    prompt: str = Field(min_length=1)
    n: int | None = Field(None, ge=1, le=10)
    size: str | None = Field(
        None, pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", description="the generator's own"
    )
    seed: int | None = Field(None, ge=0, lt=2**62, description="picture i has seed + i")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: OnlyFalse | None = None

    def reply_settings(self, gill: Gill, limits: RequestLimits) -> list[ReplySettings]:
        """How to make each picture. Raises RequestError where it cannot be made so."""
        side = gill.generator.picture_size if gill.generator is not None else None
        if side is None:
            raise RequestError("no image generator is loaded", status=404)
        own = f"{side[0]}x{side[1]}"
        if self.size not in (None, "auto", own):
            raise RequestError(
                f"size is {self.size}; the pictures made here are {own}",
                param="size",
                code="unsupported_value",
            )
        number = self.n or 1
        if number > limits.max_images:
            raise RequestError(
                f"n is {number}, at most {limits.max_images} here", param="n", code="invalid_value"
            )
        one = self.settings(gill, limits, seed=self.seed, max_images=1)
        wanted = one.model_copy(update={"want": "generate"})
        return [wanted.model_copy(update={"seed": wanted.seed + i}) for i in range(number)]


async def pictures_of(
    asked: ImageRequest, answers: Sequence[Answer], names: PictureNames
) -> dict[str, Any]:
    """All pictures in OpenAI's shape."""
    data = []
    for answer in answers:
        [image] = (await answer.whole()).images
        if asked.response_format == "url":
            shown = {"url": await names.url(image.picture)}
        else:
            png = await asyncio.to_thread(as_png, image.picture)
            shown = {"b64_json": base64.b64encode(png).decode()}
        data.append({**shown, "gill": about(image)})
    read = sum(answer.started.prompt_tokens for answer in answers)
    said = sum(answer.end.tokens for answer in answers)
    details = {"text_tokens": read, "image_tokens": 0}
    return {
        "created": int(time.time()),
        "data": data,
        "output_format": "png",
        "size": f"{image.picture.width}x{image.picture.height}",
        "usage": {
            "input_tokens": read,
            "input_tokens_details": details,
            "output_tokens": said,
            "total_tokens": read + said,
        },
    }
