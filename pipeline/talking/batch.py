"""Turns of different conversations, answered together.

Letters: B rows of a batch, one per turn; r [IMG] tokens, e language-model width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.talking.answers import (
    ConversationError,
    Ended,
    Event,
    Reply,
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
