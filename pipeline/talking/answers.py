"""What is asked of one turn, and what an answer is made of.

Started, Text ..., PictureProgress ..., RetrievedImage | GeneratedImage, Text ..., Ended
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from PIL import Image
from pydantic import Field
from torch import Tensor

from gill_errors import InputError
from gill_records import Record
from pipeline.settings import GenerationSettings
from pipeline.talking.decoding import DecodingSettings, EndReason

Part = str | Image.Image


@dataclass(frozen=True)
class ImageTokens:
    """The [IMG] tokens of a picture that was produced here, as part of what is read."""


SeenPart = Part | Tensor | ImageTokens
"""A tensor is a picture as the visual encoder has seen it: its pooled vector [d]."""


class Side(Enum):
    """Who says the parts behind it; the user, where nobody is named."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


ToldPart = SeenPart | Side
Want = Literal["auto", "text", "retrieve", "generate"]


class ConversationError(InputError):
    """A turn that cannot be answered as asked: what is wrong and what to do."""


class ContextLengthError(ConversationError):
    """A turn that the language model's positions cannot hold."""


class ReplySettings(Record):
    """How one turn is answered; the defaults are those of texts that are continued."""

    want: Want = Field(
        "auto",
        description="`auto` lets the model choose; `text` forbids pictures; `retrieve` and "
        "`generate` ask for a picture of that kind",
    )
    decoding: DecodingSettings = DecodingSettings(
        stop_at_newline=True,
        stop_after_images=True,
        words_between_images=True,
        read_back="nothing",
    )
    generation: GenerationSettings | None = Field(
        None, description="how pictures are sampled; none: as the run was set up"
    )
    candidates: int = Field(
        1,
        ge=1,
        le=64,
        description="pictures generated for one that is shown: the one whose W_i2t vector is "
        "closest to the text query",
    )
    negative_prompt: str = Field(
        "", description="what generated pictures are guided away from; empty: the empty prompt"
    )
    seed: int = Field(0, ge=0, lt=2**62, description="of sampled text and generated pictures")


IN_TURNS = ReplySettings(
    decoding=DecodingSettings(
        max_tokens=256,
        stop_after_images=True,
        words_between_images=True,
        read_back="nothing",
        image_choice="majority",
    )
)
"""How a model that knows turns answers by default: it ends its turn itself, after any lines, and an
image comes where it is likelier than words."""


@dataclass(frozen=True)
class Started:
    """The turn fits and is being read."""

    prompt_tokens: int
    """Positions read for it: the turn's own (k per picture), and after forgetting the kept ones."""
    forgotten_turns: int
    """Oldest turns that were forgotten now, to make room."""
    cached_tokens: int = 0
    """Those of `prompt_tokens` that were known from before and not read again."""


@dataclass(frozen=True)
class Text:
    """Words of the answer."""

    text: str


@dataclass(frozen=True)
class PictureProgress:
    """A picture is being made: `step` of `steps` are done.

    `preview` is how it looks by now, every `generation.preview_every` steps.
    """

    step: int
    steps: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class RetrievedImage:
    """A candidate picture with the cosine similarity that found it."""

    picture: Image.Image
    row: int
    score: float
    source: str
    caption: str
    generate_probability: float | None = None
    """What the decision model gave to generating instead; None where it was not asked."""


@dataclass(frozen=True)
class GeneratedImage:
    """A picture made by the frozen generator, with all that makes it again."""

    picture: Image.Image
    seed: int
    steps: int
    guidance: float
    generate_probability: float | None = None
    scheduler: str = "pipeline"
    negative_prompt: str = ""
    score: float | None = None
    """Cosine similarity with the text query, where it was chosen among several candidates."""


@dataclass(frozen=True)
class Ended:
    """The answer is complete; `tokens` positions were said."""

    reason: EndReason
    tokens: int


Answer = Text | RetrievedImage | GeneratedImage
Event = Started | Text | PictureProgress | RetrievedImage | GeneratedImage | Ended


class Reply(list[Answer]):
    """The pieces of one answer in their order, and how it came about."""

    forgotten_turns: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    end: EndReason = "stop"

    @property
    def text(self) -> str:
        """All words, without the pictures."""
        return "".join(answer.text for answer in self if isinstance(answer, Text))

    @property
    def images(self) -> list[RetrievedImage | GeneratedImage]:
        """All pictures."""
        return [answer for answer in self if not isinstance(answer, Text)]

    def add(self, event: Event) -> None:
        """Take one event of a stream; neighbouring pieces of text are joined."""
        if isinstance(event, Started):
            self.forgotten_turns, self.prompt_tokens = event.forgotten_turns, event.prompt_tokens
        elif isinstance(event, Ended):
            self.end, self.answer_tokens = event.reason, event.tokens
        elif isinstance(event, Text) and self and isinstance(last := self[-1], Text):
            self[-1] = Text(last.text + event.text)
        elif not isinstance(event, PictureProgress):
            self.append(event)
