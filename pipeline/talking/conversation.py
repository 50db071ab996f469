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

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.talking.answers import (
    ConversationError,
    Ended,
    Event,
    Part,
    Reply,
    ReplySettings,
    RetrievedImage,
    Started,
    Text,
    Want,
)
from pipeline.talking.context import Context
from pipeline.talking.decoding import EndReason, ImagePiece, TextPiece, stream
from pipeline.talking.picture_making import PendingPicture, make_pictures
from pipeline.talking.retrieval import Retrieved
from pipeline.talking.speaker import Speaker

# Above any logit of a trained model: an image comes as soon as it is allowed.
_CERTAIN = 1e4


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
        self._context: Context | None = Context(speaker.language_model)
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

    def fork(self) -> Conversation:
        """A copy that goes its own way: what was read is copied, the models are shared."""
        shared = (self.speaker, self.speaker.model, self.speaker.language_model)
        return copy.deepcopy(self, {id(one): one for one in shared})

    def reply(self, turn: Sequence[Part], settings: ReplySettings | None = None) -> Reply:
        """The whole answer to one turn; see `stream`."""
        return reply_together([self.prepare(turn, settings)])[0]

    def stream(
        self, turn: Sequence[Part], settings: ReplySettings | None = None
    ) -> Generator[Event, None, None]:
        """Answer one turn, event by event: Started, then words as they come, PictureProgress while
        a picture is being made, the picture, and Ended.

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
        shortest = self.speaker.heads.sizes.r if settings.decoding.max_images else 1
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
        speaker, decoding = self.speaker, turn.settings.decoding
        context, self._context = self._context, None
        context = context or Context(speaker.language_model)
        longest = decoding.max_tokens + decoding.max_images * (speaker.heads.sizes.r - 1)
        start = speaker.start()
        free = context.max_positions - len(start) - len(turn.embeddings) - longest
        before = len(self._exchanges)
        if self.num_positions > max(free, 0):
            while self._exchanges and self.num_positions > free // 2:
                self._exchanges.pop(0)
            context = Context(speaker.language_model)
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
class _Row:
    """What one row of a batch has said; `held` waits behind a picture that is not made yet."""

    ends_with_text: bool
    tokens: int = 0
    words: list[int] = field(default_factory=list)
    words_before_picture: int | None = None
    held: list[Event | PendingPicture] = field(default_factory=list)

    def release(self) -> Iterator[Event]:
        """What no longer waits."""
        while self.held:
            first = self.held[0]
            if isinstance(first, PendingPicture):
                if first.result is None:
                    return
                yield first.result
            else:
                yield first
            self.held.pop(0)


def _answer(turns: Sequence[Turn], begun: list[Turn]) -> Iterator[tuple[int, Event]]:
    speaker = turns[0].conversation.speaker
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
        speaker.model,
        together,
        prompts,
        [turn.settings.decoding for turn in turns],
        seeds=[turn.settings.seed for turn in turns],
        cancelled=lambda index: _is_cancelled(turns[index]),
    )
    pictures: list[PendingPicture] = []
    reasons: dict[int, EndReason] = {}
    for piece in pieces:
        row, turn = rows[piece.row], turns[piece.row]
        event: Text | RetrievedImage | PendingPicture
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
            if isinstance(event, PendingPicture):
                pictures.append(event)
        else:
            reasons[piece.row] = piece.reason
            continue
        row.held.append(event)
        for ready in row.release():
            yield piece.row, ready
    for index, progress in make_pictures(speaker, pictures):
        if progress is not None:
            yield index, progress
        for ready in rows[index].release():
            yield index, ready
    parts = [together] if len(turns) == 1 else together.split()
    for index, (turn, row, part) in enumerate(zip(turns, rows, parts)):
        reason: EndReason = "cancelled" if row.held else reasons[index]
        if reason != "cancelled":
            words = speaker.language_model.embed(torch.tensor(row.words, dtype=torch.int64))
            # What was read and is not remembered: pictures, and the beginning of a stop text.
            kept = len(row.words) if row.words_before_picture is None else row.words_before_picture
            part.rewind(lengths[index] + kept)
            part.note(0, words[kept:])
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
) -> RetrievedImage | PendingPicture:
    """The best candidate that was not shown yet, or what is needed to generate a picture."""
    conversation, settings = turn.conversation, turn.settings
    speaker = conversation.speaker
    best: Retrieved | None = None
    if speaker.index is not None and settings.want != "generate":
        query = speaker.model.text_query(hidden).float().cpu()
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
    assert settings.generation is not None
    return PendingPicture(
        index,
        hidden,
        list(range(first, first + settings.candidates)),
        settings.generation,
        settings.negative_prompt,
        probability,
        lambda: _is_cancelled(turn),
    )


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
