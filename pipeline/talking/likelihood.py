"""How likely the model finds the words of an interleaved sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.talking.answers import ConversationError, SeenPart
from pipeline.talking.context import Context
from pipeline.talking.reading import Said, embed_turns, join_texts, see_pictures
from pipeline.talking.speaker import Speaker


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
    sequences: Sequence[Sequence[SeenPart]],
    given: Sequence[SeenPart] = (),
    *,
    batch_size: int = 25,
) -> list[Likelihood]:
    """log p of the words of interleaved sequences after `given`, over the frozen vocabulary.

    Pictures condition what follows and have no likelihood of their own. `given` is read once.
    A chat model is given its user's turn, and each sequence is an answer of the assistant. For
    VisDial: `given` is picture and dialogue, `sequences` are the 100 answers, and the one with the
    highest `mean` is chosen (the lowest perplexity; section 4.2).

    Raises ConversationError when a sequence has no word to score or passes the last position.
    """
    model = speaker.language_model
    before = Context(model)
    before.note(0, _read_before(speaker, given))
    before.read()
    after_text = model.turns is None and bool(given) and isinstance(given[-1], str)
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


def _read_before(speaker: Speaker, given: Sequence[SeenPart]) -> Float[Tensor, "n e"]:
    if speaker.language_model.turns is None:
        read = [embedding for _, embedding in speaker.embed(given)]
        return torch.cat([speaker.start(), *read])
    [seen] = see_pictures(speaker.model, speaker.encoder, [given])
    asked = embed_turns(speaker.model, [Said("user", tuple(join_texts(seen)))])
    return torch.cat([embedding for _, embedding in asked])
