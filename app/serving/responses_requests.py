"""POST /v1/responses: what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from app.serving.chat_requests import SIDES
from app.serving.requests import AnswerRequest, Modality, OnlyFalse, Shape
from app.serving.settings import RequestLimits
from app.serving.turn_reading import PictureAddress, SentPart
from gill.loading import Gill
from pipeline.talking.answers import ReplySettings, Side


class InputText(Shape):
    """Words, of people or of an answer."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputImage(Shape):
    """A picture: a data URI, a picture of an answer, or on an allowed host."""

    type: Literal["input_image"]
    image_url: str


class Refusal(Shape):
    """What a model has refused to say; it is not read."""

    type: Literal["refusal"]


InputPart = Annotated[InputText | InputImage | Refusal, Field(discriminator="type")]


class InputMessage(Shape):
    """What somebody said."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]


class OtherItem(Shape):
    """A part of an earlier answer besides its words: accepted, and not read."""

    type: Literal["image_generation_call", "reasoning"]
    gill: dict[str, Any] | None = None


def _kind_of_item(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind in (None, "message") else "other"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[OtherItem, Tag("other")],
    Discriminator(_kind_of_item),
]


class TextFormat(Shape):
    """No JSON and no schema."""

    type: Literal["text"]


class TextSettings(Shape):
    """How the words of the answer are formed."""

    format: TextFormat | None = None


class ToolChoice(Shape):
    """The one tool that there is."""

    type: Literal["image_generation"]


class ResponseRequest(AnswerRequest):
    """The body of POST /v1/responses. Nothing is stored: every request tells all."""

    input: str | list[InputItem] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextSettings | None = None
    tool_choice: Literal["none", "auto"] | ToolChoice | None = None
    previous_response_id: None = None
    conversation: None = None
    background: OnlyFalse | None = None

    def reply_settings(self, gill: Gill, limits: RequestLimits) -> ReplySettings:
        """How to answer. Raises RequestError as `settings` does."""
        wanted: tuple[Modality, ...] = ()
        if isinstance(self.tool_choice, ToolChoice):
            wanted = ("image",)
        elif self.tool_choice == "none":
            wanted = ("text",)
        return self.settings(gill, limits, wanted, max_tokens=self.max_output_tokens)

    def exchanges(self) -> list[list[SentPart]]:
        """What people said with the answers to it; the last is the turn to answer."""
        exchanges: list[list[SentPart]] = [[]]
        if self.instructions:
            exchanges[-1] += [Side.SYSTEM, self.instructions]
        if isinstance(self.input, str):
            exchanges[-1] += [Side.USER, self.input]
            return exchanges
        answered = False
        for number, item in enumerate(self.input):
            ours = isinstance(item, OtherItem) or item.role == "assistant"
            if answered and not ours:
                exchanges.append([])
            if isinstance(item, InputMessage):
                exchanges[-1].append(SIDES.get(item.role, Side.USER))
                exchanges[-1] += _parts(item, f"input.{number}.content")
            answered = ours
        return exchanges

    def rows(self) -> list[int]:
        """Rows of the pictures that were retrieved in answers before."""
        items = self.input if isinstance(self.input, list) else []
        told = [item.gill or {} for item in items if isinstance(item, OtherItem)]
        rows = [one.get("row") for one in told]
        return [row for row in dict.fromkeys(rows) if type(row) is int]


def _parts(message: InputMessage, where: str) -> Iterator[SentPart]:
    if isinstance(message.content, str):
        yield from filter(None, [message.content])
        return
    for place, part in enumerate(message.content):
        if isinstance(part, InputText) and part.text:
            yield part.text
        elif isinstance(part, InputImage) and message.role != "assistant":
            yield PictureAddress(part.image_url, f"{where}.{place}")
