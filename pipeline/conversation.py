"""Interleaved in, interleaved out: turns of text and pictures, answered with text and pictures.

    ["how does this look at night ?", picture]  ->  [Text, GeneratedImage]

A picture comes into being where the language model produces [IMG1]: its r hidden states query the
candidate index (section 3.2), the decision model weighs retrieval against generation (section 3.3),
and the picture is fetched, or made by the frozen generator from GILLMapper's output.

What is remembered: the language model reads every turn once and keeps its keys and values, so that
a turn costs its own tokens only. When a turn and the longest answer it may get do not fit into the
language model's positions any more, whole exchanges (a turn with its answer) are forgotten, the
oldest first, until the kept ones take at most half of the positions that turn and answer leave;
these are then read again, once. `Started.forgotten_turns` and `Reply.forgotten_turns` say how many
went. Of an answer its words are remembered, its pictures are not: show one in the next turn to go
on from it. (A story told over five turns on the miniature world keeps 0.78 of the attributes that
way, 0.58 with the [IMG] tokens left in and 0.46 with the pictures read back; captions, which is
what the heads are trained on, end at [IMG].) A turn whose answer was broken off (closed, cancelled,
failed) is forgotten as a whole.

Letters: r [IMG] tokens, e language-model width, n positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipeline.decision import DecisionModel
from pipeline.decoding import (
    Context,
    DecodingSettings,
    EndReason,
    ImagePiece,
    TextPiece,
    stream,
)
from pipeline.gill import Gill
from pipeline.image_generator import ImageGenerator, OnStep
from pipeline.retrieval import RetrievalIndex, Retrieved
from pipeline.settings import GenerationSettings
from pipeline.text_conditioner import Conditioning, TextConditioner
from pipeline.visual_encoder import VisualEncoder

Part = str | Image.Image
Want = Literal["auto", "text", "retrieve", "generate"]

# Above any logit of a trained model: an image comes as soon as it is allowed.
_CERTAIN = 1e4


class ConversationError(ValueError):
    """A turn that cannot be answered as asked: what is wrong and what to do."""


class ReplySettings(BaseModel):
    """How one turn is answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    want: Want = Field(
        "auto",
        description="`auto` lets the model choose; `text` forbids pictures; `retrieve` and "
        "`generate` ask for a picture of that kind",
    )
    decoding: DecodingSettings = DecodingSettings(stop_at_newline=True, stop_after_images=True)
    generation: GenerationSettings | None = Field(
        None, description="how pictures are sampled; none: as the run was set up (Speaker)"
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


@dataclass(frozen=True)
class Started:
    """The turn fits and is being read."""

    prompt_tokens: int
    """Positions read for it: the turn's own (k per picture), and after forgetting the kept ones."""
    forgotten_turns: int
    """Oldest turns that were forgotten now, to make room."""


@dataclass(frozen=True)
class Text:
    """Words of the answer."""

    text: str


@dataclass(frozen=True)
class Progress:
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
Event = Started | Text | Progress | RetrievedImage | GeneratedImage | Ended


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
        elif not isinstance(event, Progress):
            self.append(event)


@dataclass
class Speaker:
    """Everything that answering needs, loaded once and shared by conversations.

    `index` and `decision` may be absent: without an index every picture is generated, without a
    decision model `auto` generates. `generator` may be absent too; then pictures are retrieved.
    `conditioner` gives the generator's text side, which only negative prompts need; it is called
    when the first one comes and must keep what it loaded.
    """

    gill: Gill
    encoder: VisualEncoder
    generator: ImageGenerator | None
    empty_prompt: Conditioning
    index: RetrievalIndex | None
    decision: DecisionModel | None
    open_picture: Callable[[str], Image.Image]
    conditioner: Callable[[], TextConditioner] | None = None
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    @torch.no_grad()
    def embed(
        self, parts: Sequence[Part], *, after_text: bool = False
    ) -> list[tuple[Int64[Tensor, " n"] | None, Float[Tensor, "n e"]]]:
        """Per part its ids (None for a picture) and its input vectors; k of them per picture.

        A text that follows a text is set off by one space, as captions of one story are in
        training; beside pictures none is added.

        Raises ConversationError for a part that is neither text nor picture.
        """
        model = self.gill.language_model
        embedded: list[tuple[Tensor | None, Tensor]] = []
        for number, part in enumerate(parts, 1):
            if isinstance(part, str):
                spaced = f" {part}" if after_text and part and not part[0].isspace() else part
                ids = model.tokenizer(spaced, add_special_tokens=False)["input_ids"]
                tokens = torch.tensor(ids, dtype=torch.int64)
                embedded.append((tokens, model.embed(tokens)))
                after_text = not part[-1].isspace() if part else after_text
            elif isinstance(part, Image.Image):
                pooled = self.encoder.encode_pictures([part]).to(model.device, torch.float32)
                embedded.append((None, self.gill.visual_prefix(pooled)[0]))
                after_text = False
            else:
                raise ConversationError(
                    f"part {number} of the turn is a {type(part).__name__}; give text (str) or a "
                    "picture (PIL.Image.Image)"
                )
        return embedded

    @torch.no_grad()
    def start(self) -> Float[Tensor, "n e"]:
        """What every text begins with; nothing for some language models."""
        model = self.gill.language_model
        return model.embed(torch.tensor(model.start_ids, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class Turn:
    """A turn that was read and checked, ready to be answered. `cancelled` is asked as it runs."""

    conversation: Conversation
    embeddings: Float[Tensor, "n e"]
    settings: ReplySettings
    ends_with_text: bool
    cancelled: Callable[[], bool] | None = None


class Conversation:
    """What was said so far. Not for several threads at once.

    >>> conversation = Conversation(speaker)
    >>> conversation.reply(["a red ring on the left."])
    [GeneratedImage(...), Text(" it turns blue.")]
    """

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self.shown: list[int] = []
        """Rows already retrieved: they are not shown again."""
        self.num_generated = 0
        self._exchanges: list[Tensor] = []
        self._context: Context | None = Context(speaker.gill.language_model)
        self._max_positions = self._context.max_positions
        self._ends_with_text = False
        self._busy = False

    @property
    def num_turns(self) -> int:
        """Turns that are remembered."""
        return len(self._exchanges)

    @property
    def num_positions(self) -> int:
        """Positions that they take."""
        return sum(map(len, self._exchanges))

    def reply(self, turn: Sequence[Part], settings: ReplySettings | None = None) -> Reply:
        """The whole answer to one turn; see `stream`."""
        return reply_together([self.prepare(turn, settings)])[0]

    def stream(
        self, turn: Sequence[Part], settings: ReplySettings | None = None
    ) -> Generator[Event, None, None]:
        """Answer one turn, event by event: Started, then words as they come, Progress while a
        picture is being made, the picture, and Ended.

        Pictures are generated when all words are there, the words behind a picture come after it.
        Closing the stream breaks the answer off.

        Raises ConversationError as `prepare` does, when the first event is asked for.
        """
        for _, event in stream_together([self.prepare(turn, settings)]):
            yield event

    def prepare(
        self,
        turn: Sequence[Part],
        settings: ReplySettings | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Turn:
        """Read a turn into vectors and check that it can be answered, for `stream_together`.

        Raises ConversationError for an empty turn, one that the language model's positions cannot
        hold, or a wanted kind of picture that cannot be had.
        """
        settings = self._checked(settings or ReplySettings())
        parts = self.speaker.embed(turn, after_text=self._ends_with_text)
        if not sum(len(embedding) for _, embedding in parts):
            raise ConversationError("the turn is empty: say something or show a picture")
        embeddings = torch.cat([embedding for _, embedding in parts])
        limit = self._max_positions - len(self.speaker.start())
        shortest = self.speaker.gill.heads.sizes.r if settings.decoding.max_images else 1
        if len(embeddings) + shortest > limit:
            raise ConversationError(
                f"the turn takes {len(embeddings)} positions of the language model, which has "
                f"{limit} and needs {shortest} for the shortest answer: shorten the turn"
            )
        last = next(part for part in reversed(turn) if part != "")
        ends_with_text = isinstance(last, str) and not last[-1].isspace()
        return Turn(self, embeddings, settings, ends_with_text, cancelled)

    def _checked(self, settings: ReplySettings) -> ReplySettings:
        """The settings with what `want` means for decoding."""
        speaker, want, decoding = self.speaker, settings.want, settings.decoding
        if want == "retrieve" and speaker.index is None:
            raise ConversationError("nothing to retrieve from: there is no candidate index")
        if want == "generate" and speaker.generator is None:
            raise ConversationError("no image generator is loaded")
        if want == "auto" and speaker.index is None and speaker.generator is None:
            raise ConversationError("neither index nor generator is loaded: want text")
        if settings.negative_prompt and speaker.conditioner is None:
            raise ConversationError("no text encoder is there to read the negative prompt")
        changes: dict[str, Any] = {}
        if want == "text":
            changes["max_images"] = 0
        elif want != "auto":
            if decoding.max_images == 0:
                raise ConversationError(f"max_images is 0, but a picture is wanted ({want})")
            changes["image_bias"] = _CERTAIN
        if want == "retrieve":
            assert speaker.index is not None
            left = len(speaker.index) - len(self.shown)
            if left < 1:
                raise ConversationError(
                    f"all {len(speaker.index)} candidate pictures were shown in this conversation"
                )
            changes["max_images"] = min(decoding.max_images, left)
        return settings.model_copy(
            update={
                "decoding": decoding.model_copy(update=changes),
                "generation": settings.generation or speaker.generation,
            }
        )

    def _begin(self, turn: Turn) -> tuple[Context, Float[Tensor, "n e"], int]:
        """The context to go on in, what to read next in it, and how many turns were forgotten."""
        if self._busy:
            raise ConversationError("this conversation is still answering its last turn")
        self._busy = True
        gill, decoding = self.speaker.gill, turn.settings.decoding
        context, self._context = self._context, None
        context = context or Context(gill.language_model)
        longest = decoding.max_tokens + decoding.max_images * (gill.heads.sizes.r - 1)
        start = self.speaker.start()
        free = context.max_positions - len(start) - len(turn.embeddings) - longest
        before = len(self._exchanges)
        if self.num_positions > max(free, 0):
            while self._exchanges and self.num_positions > free // 2:
                self._exchanges.pop(0)
            context = Context(gill.language_model)
        unread = [] if context.lengths[0] else [start, *self._exchanges]
        return context, torch.cat([*unread, turn.embeddings]), before - len(self._exchanges)

    def _finish(
        self, context: Context, exchange: Float[Tensor, "n e"], ends_with_text: bool
    ) -> None:
        self._context, self._ends_with_text = context, ends_with_text
        self._exchanges.append(exchange)


def reply_together(turns: Sequence[Turn]) -> list[Reply]:
    """The whole answers to turns of different conversations, which run as one batch."""
    replies = [Reply() for _ in turns]
    for index, event in stream_together(turns):
        replies[index].add(event)
    return replies


def stream_together(turns: Sequence[Turn]) -> Generator[tuple[int, Event], None, None]:
    """Answer turns of different conversations in one batch; yields (number of the turn, event).

    Each answer is what it would be alone, up to the rounding of batched sums. One decoding pass
    serves all rows, with the [IMG] tokens forced per row; pictures to generate are collected and
    made together. The conversations must share one speaker.
    """
    if len({id(turn.conversation) for turn in turns}) < len(turns):
        raise ConversationError(
            "one conversation has two turns in this batch: answer them in order"
        )
    if len({id(turn.conversation.speaker) for turn in turns}) > 1:
        raise ConversationError("the conversations of a batch must share one speaker")
    if turns:
        begun: list[Turn] = []
        try:
            yield from _answer(turns, begun)
        finally:
            for turn in begun:
                turn.conversation._busy = False


@dataclass(eq=False)
class _Picture:
    """A picture that is to be generated for a row."""

    row: int
    hidden: Float[Tensor, "1 r e"]
    seeds: list[int]
    probability: float | None
    made: list[Image.Image] = field(default_factory=list)
    result: GeneratedImage | None = None


@dataclass(eq=False)
class _Row:
    """What one row of a batch has said; `held` waits behind a picture that is not made yet."""

    ends_with_text: bool
    tokens: int = 0
    words: list[int] = field(default_factory=list)
    words_before_picture: int | None = None
    held: list[Event | _Picture] = field(default_factory=list)

    def release(self) -> Iterator[Event]:
        """What no longer waits."""
        while self.held:
            first = self.held[0]
            if isinstance(first, _Picture):
                if first.result is None:
                    return
                yield first.result
            else:
                yield first
            self.held.pop(0)


def _answer(turns: Sequence[Turn], begun: list[Turn]) -> Iterator[tuple[int, Event]]:
    speaker = turns[0].conversation.speaker
    gill = speaker.gill
    contexts, prompts, rows = [], [], []
    for index, turn in enumerate(turns):
        context, prompt, forgotten = turn.conversation._begin(turn)
        begun.append(turn)
        contexts.append(context)
        prompts.append(prompt)
        rows.append(_Row(turn.ends_with_text))
        yield index, Started(len(prompt), forgotten)
    lengths = [context.lengths[0] + len(prompt) for context, prompt in zip(contexts, prompts)]
    together = contexts[0] if len(turns) == 1 else Context.join(contexts)
    pieces = stream(
        gill,
        together,
        prompts,
        [turn.settings.decoding for turn in turns],
        seeds=[turn.settings.seed for turn in turns],
        cancelled=lambda index: _is_cancelled(turns[index]),
    )
    pictures: list[_Picture] = []
    reasons: dict[int, EndReason] = {}
    for piece in pieces:
        row, turn = rows[piece.row], turns[piece.row]
        event: Text | RetrievedImage | _Picture
        if isinstance(piece, TextPiece):
            row.words += piece.token_ids
            row.tokens += len(piece.token_ids)
            row.ends_with_text = not piece.text[-1:].isspace()
            event = Text(piece.text)
        elif isinstance(piece, ImagePiece):
            row.tokens += len(piece.token_ids)
            if row.words_before_picture is None:
                row.words_before_picture = len(row.words)
            event = _choose_picture(turn, piece.row, piece.hidden[None])
            if isinstance(event, _Picture):
                pictures.append(event)
        else:
            reasons[piece.row] = piece.reason
            continue
        row.held.append(event)
        for ready in row.release():
            yield piece.row, ready
    for index, progress in _generate(turns, pictures):
        if progress is not None:
            yield index, progress
        for ready in rows[index].release():
            yield index, ready
    parts = [together] if len(turns) == 1 else together.split()
    for index, (turn, row, part) in enumerate(zip(turns, rows, parts)):
        reason: EndReason = "cancelled" if row.held else reasons[index]
        if reason != "cancelled":
            words = gill.language_model.embed(torch.tensor(row.words, dtype=torch.int64))
            if row.words_before_picture is not None:
                part.rewind(lengths[index] + row.words_before_picture)
                part.note(0, words[row.words_before_picture :])
            exchange = torch.cat([turn.embeddings, words])
            turn.conversation._finish(part, exchange, row.ends_with_text)
        turn.conversation._busy = False
        begun.remove(turn)
        yield index, Ended(reason, row.tokens)


def _is_cancelled(turn: Turn) -> bool:
    return turn.cancelled is not None and turn.cancelled()


@torch.no_grad()
def _choose_picture(
    turn: Turn, index: int, hidden: Float[Tensor, "1 r e"]
) -> RetrievedImage | _Picture:
    """The best candidate that was not shown yet, or what is needed to generate a picture."""
    conversation, settings = turn.conversation, turn.settings
    speaker = conversation.speaker
    best: Retrieved | None = None
    if speaker.index is not None and settings.want != "generate":
        query = speaker.gill.text_query(hidden).float().cpu()
        hits = speaker.index.search(query, 1, exclude=conversation.shown)[0]
        best = hits[0] if hits else None
    probability = _generate_probability(speaker, hidden, best, settings.want)
    threshold = 0.5 if speaker.decision is None else speaker.decision.threshold
    if best is not None and (probability is None or probability < threshold):
        if best.image is None:
            raise ConversationError(
                "the candidate index knows no pictures: build it with a candidate table"
            )
        conversation.shown.append(best.row)
        picture = speaker.open_picture(best.image)
        return RetrievedImage(
            picture, best.row, best.score, best.image, best.caption or "", probability
        )
    if speaker.generator is None:
        raise ConversationError("no candidate picture is left and no image generator is loaded")
    first = settings.seed + conversation.num_generated
    conversation.num_generated += settings.candidates
    seeds = list(range(first, first + settings.candidates))
    return _Picture(index, hidden, seeds, probability)


def _generate_probability(
    speaker: Speaker, hidden: Float[Tensor, "1 r e"], best: Retrieved | None, want: Want
) -> float | None:
    """p(generate), or None where there is nothing to choose between."""
    if want != "auto" or best is None or speaker.generator is None:
        return None
    if speaker.decision is None:
        return 1.0
    similarity = torch.tensor([best.score])
    return float(speaker.decision.decide(hidden.float().cpu(), similarity)[0])


def _generate(
    turns: Sequence[Turn], pictures: Sequence[_Picture]
) -> Iterator[tuple[int, Progress | None]]:
    """Make the pictures; those sampled alike share batches. (row, None): one more is ready."""
    alike: dict[tuple[GenerationSettings, str], list[_Picture]] = {}
    for picture in pictures:
        settings = turns[picture.row].settings
        assert settings.generation is not None
        alike.setdefault((settings.generation, settings.negative_prompt), []).append(picture)
    for (generation, negative_prompt), group in alike.items():
        jobs = [(picture, seed) for picture in group for seed in picture.seeds]
        size = generation.batch_size
        while jobs := [job for job in jobs if not _is_cancelled(turns[job[0].row])]:
            batch, jobs = jobs[:size], jobs[size:]
            yield from _generate_batch(turns, batch, generation, negative_prompt)


def _generate_batch(
    turns: Sequence[Turn],
    jobs: Sequence[tuple[_Picture, int]],
    generation: GenerationSettings,
    negative_prompt: str,
) -> Generator[tuple[int, Progress | None], None, None]:
    speaker = turns[0].conversation.speaker
    generator = speaker.generator
    assert generator is not None
    prompts = _conditioning(speaker.gill, torch.cat([picture.hidden for picture, _ in jobs]))
    away = speaker.empty_prompt
    if negative_prompt:
        assert speaker.conditioner is not None
        away = speaker.conditioner().encode([negative_prompt])
    batch = list(dict.fromkeys(picture for picture, _ in jobs))

    def work(on_step: OnStep) -> list[Image.Image]:
        return generator.generate(
            prompts, away, seeds=[seed for _, seed in jobs], settings=generation, on_step=on_step
        )

    steps = _steps_of(work, lambda: all(_is_cancelled(turns[picture.row]) for picture in batch))
    while True:
        try:
            step, total, previews = next(steps)
        except StopIteration as stop:
            found: list[Image.Image] | None = stop.value
            break
        for picture in batch:
            # A picture chosen among many may need several batches: its steps go on counting.
            before, num = len(picture.made), len(picture.seeds)
            share = sum(one is picture for one, _ in jobs)
            done = round(total * (before + share * step / total) / num)
            preview = None
            if previews is not None:
                preview = next(p for p, (one, _) in zip(previews, jobs) if one is picture)
            yield picture.row, Progress(done, total, preview)
    if found is None:
        return
    for (picture, _), image in zip(jobs, found):
        picture.made.append(image)
    for picture in batch:
        if len(picture.made) == len(picture.seeds):
            picture.result = _best(speaker, picture, generation, negative_prompt)
            yield picture.row, None


@torch.no_grad()
def _conditioning(gill: Gill, hidden: Float[Tensor, "B r e"]) -> Conditioning:
    pooled = None
    if gill.heads.pooled_projection is not None:
        pooled = gill.generation_pooled(hidden)
    return Conditioning(gill.generation_embedding(hidden), pooled)


@torch.no_grad()
def _best(
    speaker: Speaker, picture: _Picture, generation: GenerationSettings, negative_prompt: str
) -> GeneratedImage:
    """Of several candidates the one whose key is closest to the text query."""
    best, score = 0, None
    if len(picture.made) > 1:
        gill = speaker.gill
        pooled = speaker.encoder.encode_pictures(picture.made)
        keys = gill.image_key(pooled.to(gill.language_model.device, torch.float32))
        scores = (keys @ gill.text_query(picture.hidden)[0]).float()
        best = int(scores.argmax())
        score = float(scores[best])
    return GeneratedImage(
        picture.made[best],
        picture.seeds[best],
        generation.steps,
        generation.guidance,
        picture.probability,
        generation.scheduler,
        negative_prompt,
        score,
    )


_Step = tuple[int, int, list[Image.Image] | None]


class _AbandonedError(Exception):
    """Nobody waits for this picture any more."""


def _steps_of(
    work: Callable[[OnStep], list[Image.Image]],
    is_abandoned: Callable[[], bool],
) -> Generator[_Step, None, list[Image.Image] | None]:
    """Run `work(on_step)` in a thread, yield its steps as they come, and return what it returns.

    None when it was abandoned; closing the generator abandons it too, at its next step.
    """
    steps: SimpleQueue[_Step | None] = SimpleQueue()
    closed = threading.Event()

    def on_step(done: int, total: int, previews: list[Image.Image] | None) -> None:
        if closed.is_set() or is_abandoned():
            raise _AbandonedError
        steps.put((done, total, previews))

    with ThreadPoolExecutor(1, "pictures") as pool:
        future = pool.submit(work, on_step)
        future.add_done_callback(lambda _: steps.put(None))
        try:
            while (step := steps.get()) is not None:
                yield step
        finally:
            closed.set()
        try:
            return future.result()
        except _AbandonedError:
            return None


@dataclass(frozen=True)
class Likelihood:
    """How likely the language model finds the words of a sequence."""

    total: float
    """Sum of log p(token | all before it), in nats."""
    num_tokens: int

    @property
    def mean(self) -> float:
        """Per token: what sequences of different lengths are ranked by."""
        return self.total / self.num_tokens


@torch.no_grad()
def log_likelihoods(
    speaker: Speaker,
    sequences: Sequence[Sequence[Part]],
    given: Sequence[Part] = (),
    *,
    batch_size: int = 25,
) -> list[Likelihood]:
    """log p of the words of interleaved sequences after `given`, over the frozen vocabulary.

    Pictures condition what follows and have no likelihood of their own. `given` is read once. For
    VisDial: `given` is picture and dialogue, `sequences` are the 100 answers, and the one with the
    highest `mean` is chosen (the lowest perplexity; section 4.2).

    Raises ConversationError when a sequence has no word to score or passes the last position.
    """
    model = speaker.gill.language_model
    before = Context(model)
    prefix = speaker.embed(given)
    before.note(0, torch.cat([speaker.start(), *(embedding for _, embedding in prefix)]))
    before.read()
    after_text = bool(given) and isinstance(given[-1], str)
    found: list[Likelihood] = []
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size]
        parts = [speaker.embed(sequence, after_text=after_text) for sequence in batch]
        context = Context.join([before] * len(batch))
        for row, one in enumerate(parts):
            inputs = torch.cat([before.last_hidden[:0], *(embedding for _, embedding in one)])
            if len(inputs) > context.room(row):
                raise ConversationError(
                    f"sequence {first + row + 1} takes {len(inputs)} positions, but only "
                    f"{context.room(row)} are left of {context.max_positions}: shorten it"
                )
            context.note(row, inputs)
        hidden = context.read()
        for row, one in enumerate(parts):
            targets = torch.cat(
                [
                    torch.full((len(embedding),), -1) if ids is None else ids
                    for ids, embedding in one
                ]
                or [torch.empty(0, dtype=torch.int64)]
            )
            own = hidden[row, hidden.shape[1] - len(targets) :]
            predictors = torch.cat([before.last_hidden, own])[: len(targets)]
            scored = targets >= 0
            if before.lengths[0] == 0:
                scored[:1] = False
            if not scored.any():
                raise ConversationError(f"sequence {first + row + 1} has no word to score")
            odds = model.logits(predictors[scored.to(own.device)]).float().log_softmax(-1)
            words = targets[scored].to(own.device)
            total = odds.gather(1, words[:, None]).double().sum()
            found.append(Likelihood(float(total), len(words)))
    return found
