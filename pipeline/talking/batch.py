"""Turns of different conversations, answered together.

Letters: B rows of a batch, one per turn; r [IMG] tokens, e language-model width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from pipeline.talking.answers import (
    ConversationError,
    Ended,
    Event,
    Reply,
    RetrievedImage,
    Text,
    Want,
)
from pipeline.talking.context import Context
from pipeline.talking.decoding import (
    EndPiece,
    EndReason,
    ImagePiece,
    Piece,
    TextPiece,
    WaitPiece,
    stream,
)
from pipeline.talking.picture_making import PendingPicture, make_pictures
from pipeline.talking.retrieval import Retrieved
from pipeline.talking.speaker import Speaker

if TYPE_CHECKING:
    from pipeline.talking.conversation import Turn


def reply_together(turns: Sequence[Turn]) -> list[Reply]:
    """The whole answers to turns of different conversations, which run as one batch."""
    replies = [Reply() for _ in turns]
    for index, event in stream_together(turns):
        replies[index].add(event)
    return replies


def stream_together(turns: Sequence[Turn]) -> Generator[tuple[int, Event], None, None]:
    """Answer turns of different conversations in one batch; yields (number of the turn, event).

    Each answer is what it would be alone, up to the rounding of batched sums. The conversations
    must share one speaker. Raises ConversationError where they do not.
    """
    with closing(Batch(turns)) as batch:
        while not batch.has_spoken:
            yield from batch.speak()
            for _, index, event in paint_together([batch]):
                yield index, event


def paint_together(batches: Sequence[Batch]) -> Iterator[tuple[Batch, int, Event]]:
    """The pictures that batches of one speaker are waiting for, when they can say no more: made in
    one go, with what was held behind them, and the end of the turns that waited for nothing else.
    """
    owners = {
        picture: batch for batch in batches for picture in batch.pictures if picture.result is None
    }
    if owners:
        [speaker] = {batch.speaker for batch in batches}
        for picture, progress in make_pictures(speaker, list(owners)):
            batch, index = owners[picture], picture.row
            if progress is not None:
                yield batch, index, progress
            else:
                for event in batch.release(index):
                    yield batch, index, event
    for batch in batches:
        if batch.has_spoken:
            for index, event in batch.end_cancelled():
                yield batch, index, event


@dataclass(eq=False)
class _Row:
    """What one row of a batch has said; `held` waits behind a picture that is not made yet."""

    ends_with_text: bool
    tokens: int = 0
    said: list[list[int] | Tensor] = field(default_factory=list)
    """Words by their ids, and what stands in place of pictures by its vectors."""
    told: list[str | Tensor] = field(default_factory=list)
    """The same with words as text."""
    words_before_picture: int | None = None
    last_picture: RetrievedImage | PendingPicture | None = None
    held: list[Event | PendingPicture] = field(default_factory=list)
    reason: EndReason = "cancelled"

    def hear(self, piece: TextPiece) -> None:
        """The row says these words next."""
        self.said.append(list(piece.token_ids))
        self.told.append(piece.text)
        self.tokens += len(piece.token_ids)
        self.ends_with_text = not piece.text[-1:].isspace()
        self.held.append(Text(piece.text))

    def stand(self, vectors: Tensor) -> None:
        """These stand in place of a picture."""
        self.said.append(vectors)
        self.told.append(vectors)

    @property
    def num_words(self) -> int:
        """Tokens of the words."""
        return sum(len(piece) for piece in self.said if isinstance(piece, list))

    @property
    def shown(self) -> Image.Image | None:
        """The last picture that is to be read back, once it is there."""
        last = self.last_picture
        made = last.result if isinstance(last, PendingPicture) else last
        return None if made is None else made.picture

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


class Batch:
    """Turns of different conversations that share one speaker.

    First `speak`; then `paint_together`, which may run in another thread while other batches speak;
    both again until it `has_spoken`, which takes several rounds where pictures are read back; at
    last `close`. One decoding pass serves all rows, with the [IMG] tokens forced per row. A turn
    ends as soon as it waits for no picture.
    """

    def __init__(self, turns: Sequence[Turn]) -> None:
        if len({id(turn.conversation) for turn in turns}) < len(turns):
            raise ConversationError(
                "one conversation has two turns in this batch: answer them in order"
            )
        if len({id(turn.conversation.speaker) for turn in turns}) > 1:
            raise ConversationError("the conversations of a batch must share one speaker")
        self._turns = turns
        self._rows = [_Row(turn.heard.ends_with_text) for turn in turns]
        self.pictures: list[PendingPicture] = []
        """Those that are to be generated."""
        self.has_spoken = not turns
        self._pieces: Iterator[Piece] | None = None
        self._contexts: list[Context] = []
        self._lengths: list[int] = []
        self._begun: set[int] = set()

    @property
    def speaker(self) -> Speaker:
        """The one that all conversations share."""
        return self._turns[0].conversation.speaker

    def speak(self) -> Iterator[tuple[int, Event]]:
        """Words and retrieved pictures, up to the first picture of each turn that is to be
        generated, and the end of every turn that waits for none. Called again, it goes on behind
        pictures that have been made meanwhile and are read back."""
        if self.has_spoken:
            return
        if self._pieces is None:
            yield from self._begin()
        assert self._pieces is not None
        for piece in self._pieces:
            if isinstance(piece, WaitPiece):
                return
            self._hear(piece)
            for ready in self._rows[piece.row].release():
                yield piece.row, ready
        self.has_spoken = True
        if len(self._turns) > 1:
            self._contexts = self._contexts[0].split()
        for index, row in enumerate(self._rows):
            if not row.held:
                yield index, self._end(index)

    def _begin(self) -> Iterator[tuple[int, Event]]:
        prompts, contexts = [], []
        for index, turn in enumerate(self._turns):
            context, prompt, started = turn.conversation.begin(turn)
            self._begun.add(index)
            contexts.append(context)
            prompts.append(prompt)
            self._lengths.append(context.lengths[0] + len(prompt))
            yield index, started
        self._contexts = contexts if len(contexts) == 1 else [Context.join(contexts)]
        self._pieces = stream(
            self.speaker.model,
            self._contexts[0],
            prompts,
            [turn.settings.decoding for turn in self._turns],
            seeds=[turn.settings.seed for turn in self._turns],
            cancelled=lambda index: _is_cancelled(self._turns[index]),
            shown=self._read_back,
        )

    def _hear(self, piece: TextPiece | ImagePiece | EndPiece) -> None:
        row = self._rows[piece.row]
        if isinstance(piece, TextPiece):
            row.hear(piece)
        elif isinstance(piece, ImagePiece):
            turn = self._turns[piece.row]
            row.tokens += len(piece.token_ids)
            if row.words_before_picture is None:
                row.words_before_picture = row.num_words
            event = _choose_picture(turn, piece.row, piece.hidden[None])
            if isinstance(event, PendingPicture):
                self.pictures.append(event)
            row.held.append(event)
            if turn.settings.decoding.read_back == "image_tokens_and_picture":
                row.stand(self.speaker.heads.image_embeddings.detach())
            if turn.settings.decoding.read_back.endswith("picture"):
                row.last_picture, row.ends_with_text = event, False
        else:
            row.reason = piece.reason

    def _read_back(self, index: int) -> Float[Tensor, "k e"] | None:
        """The visual vectors of a row's last picture, when it is there."""
        row = self._rows[index]
        if row.shown is None:
            return None
        [(_, vectors)] = self.speaker.embed([row.shown])
        row.stand(vectors)
        row.last_picture = None
        return vectors

    def release(self, index: int) -> Iterator[Event]:
        """What a turn has to say as it waits no longer, and its end where that is all."""
        yield from self._rows[index].release()
        if self.has_spoken and not self._rows[index].held:
            yield self._end(index)

    def end_cancelled(self) -> Iterator[tuple[int, Event]]:
        """The end of the turns whose pictures nobody waits for any more."""
        for index in sorted(self._begun):
            yield index, self._end(index)

    def close(self) -> None:
        """What was not ended was never said."""
        for index in self._begun:
            self._turns[index].conversation.abandon()
        self._begun.clear()

    def _end(self, index: int) -> Ended:
        turn, row, context = self._turns[index], self._rows[index], self._contexts[index]
        reason: EndReason = "cancelled" if row.held else row.reason
        if reason == "cancelled":
            turn.conversation.abandon()
        else:
            self._read_back(index)  # the last one, behind which nothing was said
            said = torch.cat([turn.heard.embeddings[:0], *map(self._embedded, row.said)])
            # What was read and is not remembered: [IMG] tokens, and the beginning of a stop text.
            kept = min(len(said), context.lengths[0] - self._lengths[index])
            tokens_only = turn.settings.decoding.read_back == "image_tokens"
            if tokens_only and row.words_before_picture is not None:
                kept = row.words_before_picture
            context.rewind(self._lengths[index] + kept)
            context.note(0, said[kept:])
            turn.conversation.finish(turn, context, said, row.told, row.ends_with_text)
        self._begun.discard(index)
        return Ended(reason, row.tokens)

    def _embedded(self, piece: list[int] | Tensor) -> Tensor:
        if isinstance(piece, Tensor):
            return piece
        return self.speaker.language_model.embed(torch.tensor(piece, dtype=torch.int64))


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
