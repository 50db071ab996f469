"""Interleaved in, interleaved out: turns of text and pictures, answered with text and pictures.

A picture comes into being where the language model produces [IMG1]: its r hidden states query the
candidate index (section 3.2), the decision model weighs retrieval against generation (section 3.3),
and the picture is fetched, or made by the frozen generator from GILLMapper's output.

    ["how does this look at night ?", picture]  ->  [Text, GeneratedImage]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipeline.decision import DecisionModel
from pipeline.decoding import Context, DecodingSettings, ImagePiece, TextPiece, stream
from pipeline.gill import Gill
from pipeline.image_generator import ImageGenerator
from pipeline.retrieval import RetrievalIndex, Retrieved
from pipeline.settings import GenerationSettings
from pipeline.text_conditioner import Conditioning
from pipeline.visual_encoder import VisualEncoder

Part = str | Image.Image
Want = Literal["auto", "text", "retrieve", "generate"]

# Above any logit of a trained model: an image comes as soon as it is allowed.
_CERTAIN = 1e4


class ReplySettings(BaseModel):
    """How one turn is answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    want: Want = Field(
        "auto",
        description="`auto` lets the model choose; `text` forbids pictures; `retrieve` and "
        "`generate` ask for a picture of that kind",
    )
    decoding: DecodingSettings = DecodingSettings()
    generation: GenerationSettings = GenerationSettings()
    seed: int = Field(0, description="of sampled text and generated pictures")


@dataclass(frozen=True)
class Text:
    """Words of the answer."""

    text: str


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
    """A picture made by the frozen generator."""

    picture: Image.Image
    seed: int
    steps: int
    guidance: float
    generate_probability: float | None = None


Answer = Text | RetrievedImage | GeneratedImage


@dataclass
class Speaker:
    """Everything that answering needs, loaded once and shared by conversations.

    `index` and `decision` may be absent: without an index every picture is generated, without a
    decision model `auto` generates. `generator` may be absent too; then pictures are retrieved.
    """

    gill: Gill
    encoder: VisualEncoder
    generator: ImageGenerator | None
    empty_prompt: Conditioning
    index: RetrievalIndex | None
    decision: DecisionModel | None
    open_picture: Callable[[str], Image.Image]


@dataclass
class Conversation:
    """The turns so far; the language model has read them once and keeps their keys and values."""

    speaker: Speaker
    shown: list[int] = field(default_factory=list)
    """Rows already retrieved: they are not shown again."""
    num_generated: int = 0

    def __post_init__(self) -> None:
        self._context = Context(self.speaker.gill.language_model)
        self._started = False

    def reply(self, turn: Sequence[Part], settings: ReplySettings | None = None) -> list[Answer]:
        """The whole answer to one turn; neighbouring pieces of text are joined."""
        answers: list[Answer] = []
        for piece in self.stream(turn, settings):
            last = answers[-1] if answers else None
            if isinstance(piece, Text) and isinstance(last, Text):
                answers[-1] = Text(last.text + piece.text)
            else:
                answers.append(piece)
        return answers

    def stream(
        self,
        turn: Sequence[Part],
        settings: ReplySettings | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Answer]:
        """Yield pieces of text as they come, and pictures when they are there.

        `on_step(done, total)` hears of the denoising steps of generated pictures.
        Raises ValueError for an empty turn, a turn that passes the language model's last position,
        or a wanted kind of picture that cannot be had.
        """
        settings = settings or ReplySettings()
        self._check_want(settings.want)
        decoding = settings.decoding
        if settings.want == "text":
            decoding = decoding.model_copy(update={"max_images": 0})
        elif settings.want != "auto":
            decoding = decoding.model_copy(update={"image_bias": _CERTAIN})
        prompt = self._read(turn)
        pieces = stream(self.speaker.gill, self._context, [prompt], decoding, seeds=[settings.seed])
        for piece in pieces:
            if isinstance(piece, TextPiece):
                yield Text(piece.text)
            elif isinstance(piece, ImagePiece):
                yield self._picture(piece.hidden[None], settings, on_step)

    def _check_want(self, want: Want) -> None:
        if want == "retrieve" and self.speaker.index is None:
            raise ValueError("nothing to retrieve from: there is no candidate index")
        if want == "generate" and self.speaker.generator is None:
            raise ValueError("no image generator is loaded")

    @torch.no_grad()
    def _read(self, turn: Sequence[Part]) -> Float[Tensor, "T e"]:
        """The turn as input vectors: words embedded, pictures as k visual tokens each."""
        gill, model = self.speaker.gill, self.speaker.gill.language_model
        parts: list[Tensor] = []
        if not self._started:
            parts.append(model.embed(torch.tensor(model.start_ids, dtype=torch.int64)))
        for part in turn:
            if isinstance(part, str):
                ids = model.tokenizer(part, add_special_tokens=False)["input_ids"]
                parts.append(model.embed(torch.tensor(ids, dtype=torch.int64)))
            else:
                pooled = self.speaker.encoder.encode_pictures([part])
                parts.append(gill.visual_prefix(pooled.to(model.device, torch.float32))[0])
        if not turn or not any(len(part) for part in parts):
            raise ValueError("the turn is empty: say something or show a picture")
        self._started = True
        return torch.cat(parts)

    @torch.no_grad()
    def _picture(
        self,
        hidden: Float[Tensor, "1 r e"],
        settings: ReplySettings,
        on_step: Callable[[int, int], None] | None,
    ) -> RetrievedImage | GeneratedImage:
        speaker = self.speaker
        best: Retrieved | None = None
        if speaker.index is not None and settings.want != "generate":
            query = speaker.gill.text_query(hidden).float().cpu()
            hits = speaker.index.search(query, 1, exclude=self.shown)[0]
            best = hits[0] if hits else None
        probability = self._generate_probability(hidden, best, settings.want)
        if best is not None and (probability is None or probability < self._threshold):
            return self._retrieved(best, probability)
        return self._generate(hidden, settings, probability, on_step)

    @property
    def _threshold(self) -> float:
        """From this p(generate) on a picture is generated."""
        decision = self.speaker.decision
        return 0.5 if decision is None else decision.threshold

    def _retrieved(self, hit: Retrieved, probability: float | None) -> RetrievedImage:
        if hit.image is None:
            raise ValueError(
                "the candidate index knows no pictures: build it with a candidate table"
            )
        self.shown.append(hit.row)
        picture = self.speaker.open_picture(hit.image)
        return RetrievedImage(
            picture, hit.row, hit.score, hit.image, hit.caption or "", probability
        )

    def _generate_probability(
        self, hidden: Float[Tensor, "1 r e"], best: Retrieved | None, want: Want
    ) -> float | None:
        """p(generate), or None where there is nothing to choose between."""
        if want == "generate" or best is None or self.speaker.generator is None:
            return None
        if want == "retrieve":
            return None
        if self.speaker.decision is None:
            return 1.0
        similarity = torch.tensor([best.score])
        return float(self.speaker.decision.decide(hidden.float().cpu(), similarity)[0])

    def _generate(
        self,
        hidden: Float[Tensor, "1 r e"],
        settings: ReplySettings,
        probability: float | None,
        on_step: Callable[[int, int], None] | None,
    ) -> GeneratedImage:
        gill, generator = self.speaker.gill, self.speaker.generator
        if generator is None:
            raise ValueError("no candidate picture is left to retrieve and no generator is loaded")
        pooled = None
        if gill.heads.pooled_projection is not None:
            pooled = gill.generation_pooled(hidden)
        seed = settings.seed + self.num_generated
        self.num_generated += 1
        picture = generator.generate(
            Conditioning(gill.generation_embedding(hidden), pooled),
            self.speaker.empty_prompt,
            seeds=[seed],
            settings=settings.generation,
            on_step=on_step,
        )[0]
        return GeneratedImage(
            picture, seed, settings.generation.steps, settings.generation.guidance, probability
        )
