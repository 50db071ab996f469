"""What was said in a conversation, for people: as HTML (on the page and as a file) and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from PIL import Image

from app.encoded_pictures import picture_uri, preview_uri
from pipeline.talking.answers import Answer, GeneratedImage, ReplySettings, RetrievedImage, Text

_LARGEST_SHOWN = 512


@dataclass(eq=False)
class Piece:
    """A text or a picture of a turn; `answer` where it was the model who gave it."""

    text: str = ""
    picture: Image.Image | None = None
    answer: Answer | None = None

    @classmethod
    def of(cls, answer: Answer) -> Piece:
        """The piece that a part of an answer makes."""
        if isinstance(answer, Text):
            return cls(text=answer.text, answer=answer)
        return cls(picture=answer.picture, answer=answer)

    @cached_property
    def shown(self) -> str:
        """The picture as a data URI of at most 512 pixels."""
        assert self.picture is not None
        return preview_uri(self.picture, _LARGEST_SHOWN)

    @property
    def small(self) -> bool:
        """Whether it is a picture of at most 128 pixels a side, to be shown larger."""
        return self.picture is not None and max(self.picture.size) <= 128

    @property
    def origin(self) -> str:
        """Where a picture of the model comes from, in one line."""
        match self.answer:
            case RetrievedImage(score=score, source=source):
                return f"retrieved · score {score:.3f} · {source}"
            case GeneratedImage(seed=seed, steps=steps):
                return f"generated · seed {seed} · {steps} steps"
        return ""

    @property
    def detail(self) -> str:
        """The candidate's caption, and what the decision model thought."""
        parts = []
        if isinstance(self.answer, RetrievedImage) and self.answer.caption:
            parts.append(f"“{self.answer.caption}”")
        if (
            not isinstance(self.answer, Text | None)
            and self.answer.generate_probability is not None
        ):
            parts.append(f"p(generate) = {self.answer.generate_probability:.2f}")
        return " · ".join(parts)

    @property
    def kind(self) -> str:
        """`retrieved`, `generated`, ...: what a reader calls it."""
        match self.answer:
            case RetrievedImage():
                return "retrieved"
            case GeneratedImage():
                return "generated"
        return "text" if self.picture is None else "picture"


@dataclass(eq=False)
class Exchange:
    """One turn, its answer so far, and how it was asked for.

    forgotten: oldest turns that the model forgot to make room for this one; only: the kind of
    pictures that alone it was to have; problem: why the answer ended badly; working: what is being
    done now; preview: a picture half made.
    """

    turn: list[Piece]
    settings: ReplySettings
    answer: list[Piece] = field(default_factory=list)
    forgotten: int = 0
    only: Literal["retrieve", "generate"] | None = None
    problem: str = ""
    working: str = ""
    preview: Piece | None = None

    def add(self, answer: Answer) -> None:
        """Append a piece; neighbouring texts become one."""
        last = self.answer[-1] if self.answer else None
        if isinstance(answer, Text) and last is not None and last.picture is None:
            last.text += answer.text
        else:
            self.answer.append(Piece.of(answer))


def to_html(exchanges: Sequence[Exchange]) -> str:
    """A fragment: the conversation as `article` elements."""
    return template("conversation.html").module.conversation(exchanges)  # type: ignore[attr-defined]


def style() -> str:
    """The CSS that goes with the fragment."""
    return str(template("conversation.html").module.style())  # type: ignore[attr-defined]


def to_page(exchanges: Sequence[Exchange], title: str = "A conversation with GILL") -> str:
    """A whole HTML file that needs nothing else."""
    return template("conversation.html").render(exchanges=exchanges, title=title)


def to_json(exchanges: Sequence[Exchange]) -> str:
    """Everything that was said and how it was made; pictures as PNG data URIs."""
    described = [
        {
            "turn": [_describe(piece) for piece in exchange.turn],
            "settings": exchange.settings.model_dump(mode="json"),
            "answer": [_describe(piece) for piece in exchange.answer],
            **({"problem": exchange.problem} if exchange.problem else {}),
        }
        for exchange in exchanges
    ]
    return json.dumps({"format": "gill-conversation", "exchanges": described}, indent=1)


def _describe(piece: Piece) -> dict[str, Any]:
    if piece.picture is None:
        return {"kind": "text", "text": piece.text}
    one: dict[str, Any] = {"kind": piece.kind, "picture": picture_uri(piece.picture)}
    if isinstance(piece.answer, RetrievedImage | GeneratedImage):
        names = [field.name for field in fields(piece.answer) if field.name != "picture"]
        one |= {name: getattr(piece.answer, name) for name in names}
    return one


def template(name: str) -> Any:
    """A template of this room; what is put into it is escaped, data URIs by the filter `uri`."""
    environment = Environment(
        loader=PackageLoader("app"),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["uri"] = Markup
    return environment.get_template(name)
