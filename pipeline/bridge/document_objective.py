"""The objective over interleaved documents: every text, every [IMG1], every picture to be produced.

    l_c  every token of text that is to be learnt: its sum, divided as `token_reduction` says
         (documents, or supervised tokens)
    l_p  [IMG1] at every `Drawn`, and every token of text that teaches where it does not belong
    l_r  the [IMG1] states of all `Drawn` of the batch against the keys of their pictures; places
         with the same picture are not compared with each other
    l_g  the distance at every `Drawn`, their mean

A document (caption, Drawn) has the numbers of the caption's own image pass. Switches about captions
in pairs and about start ids do not touch documents, which are read one to a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gill_errors import InputError
from pipeline.bridge.document_streams import document_streams, prediction_counts
from pipeline.bridge.documents import DocumentBatch, Words
from pipeline.bridge.losses import constant_cross_entropy_sum, cross_entropy_sum
from pipeline.bridge.multimodal_language_model import (
    MultimodalLanguageModel,
    Places,
    Supervised,
)
from pipeline.bridge.objective import (
    DISTANCES,
    Divisors,
    Losses,
    contrastive_losses,
    refuse_float16,
)
from pipeline.devices import groups_sent_together, sent_together
from pipeline.frozen.packing import Packing
from pipeline.settings import Objective


@dataclass(frozen=True)
class DocumentStates:
    """What the pass over documents yields; each pair is constant and dependent hidden states."""

    drawn: Float[Tensor, "Q r e"]
    """Of the [IMG] tokens of every `Drawn`, in order."""
    words: tuple[Supervised, Supervised]
    """Predictions of l_c."""
    image_token: tuple[Supervised, Supervised]
    """Predictions of l_p."""


def document_losses(
    gill: MultimodalLanguageModel,
    batch: DocumentBatch,
    objective: Objective,
    divisors: Divisors | None = None,
) -> Losses:
    """All losses of a batch of documents.

    Raises:
        ValueError: a document exceeds the language model's positions; pooled targets are missing;
            the language model is in float16, in which gradients underflow.
    """
    divisors = divisors or document_divisors(gill, batch, objective)
    losses, queries = document_shares(gill, batch, objective, divisors)
    if queries is None:
        return losses
    return losses.with_retrieval(objective, *document_contrast(gill, batch, objective, queries))


def document_divisors(
    gill: MultimodalLanguageModel, batch: DocumentBatch, objective: Objective
) -> Divisors:
    """What sums over tokens are divided by, and the number of `Drawn`."""
    examples = len(batch.drawn)
    if objective.token_reduction == "examples":
        return Divisors(len(batch), (len(batch),), examples)
    words, image_token = prediction_counts(batch.documents, len(gill.language_model.start_ids))
    return Divisors(words, (image_token,), examples)


def document_shares(
    gill: MultimodalLanguageModel,
    batch: DocumentBatch,
    objective: Objective,
    divisors: Divisors,
) -> tuple[Losses, Float[Tensor, "Q p"] | None]:
    """What these documents contribute to the losses of a whole batch, without retrieval.

    Also the retrieval queries of their `Drawn`, where the objective has retrieval. Raises as
    `document_losses`.
    """
    refuse_float16(gill)
    captioning = image_token = generation = pooled = zero = gill.heads.logit_scale.new_zeros(())
    states = read_documents(gill, batch)
    if objective.captioning_weight:
        images = objective.captioning_softmax == "words_and_images"
        captioning = _quotient(_words_sum(gill, states.words, images), divisors.captioning)
    if objective.image_token_weight:
        image_token = _quotient(_image_token_sum(gill, states.image_token), divisors.image_token[0])
    if objective.generation_weight and len(states.drawn):
        distance, share = DISTANCES[objective.generation_loss], len(states.drawn)
        drawn = _pictures(batch)
        output = gill.generation_embedding(states.drawn)
        generation = _quotient(share * distance(output, batch.targets[drawn]), divisors.examples)
        if gill.heads.pooled_projection is not None:
            if batch.pooled_targets is None:
                raise InputError(
                    "the heads have a pooled projection, but the batch no pooled targets"
                )
            output = gill.generation_pooled(states.drawn)
            pooled = _quotient(
                share * distance(output, batch.pooled_targets[drawn]), divisors.examples
            )
    total = (
        objective.captioning_weight * captioning
        + objective.image_token_weight * image_token
        + objective.generation_weight * (generation + pooled)
    )
    queries = gill.text_query(states.drawn) if objective.retrieval_weight else None
    return Losses(total, captioning, image_token, zero, zero, generation, pooled), queries


def document_queries(gill: MultimodalLanguageModel, batch: DocumentBatch) -> Float[Tensor, "Q p"]:
    """The retrieval queries of `document_shares` alone."""
    return gill.text_query(read_documents(gill, batch).drawn)


def document_contrast(
    gill: MultimodalLanguageModel,
    batch: DocumentBatch,
    objective: Objective,
    queries: Float[Tensor, "Q p"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Both terms of Eq. 4 over every `Drawn` of the batch of all processes."""
    drawn = _pictures(batch)
    keys = gill.image_key(batch.pooled[drawn])
    return contrastive_losses(gill, objective, queries, keys, batch.rows[drawn])


def read_documents(gill: MultimodalLanguageModel, batch: DocumentBatch) -> DocumentStates:
    """Read documents in one packed pass, what depends on nothing trainable without gradient."""
    model, sizes = gill.language_model, gill.heads.sizes
    streams = document_streams(batch.documents, sizes.k, sizes.r, len(model.start_ids))
    ids = [
        i for doc in batch.documents for part in doc if isinstance(part, Words) for i in part.ids
    ]
    words = gill.words(torch.tensor(ids, dtype=torch.int64))
    # Read once per model: the same for every document.
    start = model.read_start()
    parts = [model.embed(words[:0]) if start is None else start.hidden[-1:]]
    before = None if start is None else start.prefix.repeat(len(streams.suffix.lengths))
    begun = 0 if start is None else len(start.hidden)
    read = [begun + length for length in streams.prefix.lengths]
    # What each pass follows.
    starts = [
        (streams.prefix, [begun] * len(read)),
        (streams.suffix, [begun if i < 0 else read[i] for i in streams.follows]),
    ]
    predictions = [*streams.words, *streams.image_token]
    # Both passes in one copy, before the first.
    first, first_sequences, second, second_sequences, [shown], *predicted = groups_sent_together(
        [
            *(
                lists
                for stream, past in starts
                for lists in (
                    Places.lists(stream),
                    Packing.lists(stream.lengths, past, words.device) if past else [],
                )
            ),
            [streams.shown],
            *([p.predictors, p.targets] for p in predictions),
        ],
        words.device,
    )
    if streams.prefix.lengths:
        with torch.no_grad():
            inputs = gill.inputs(Places(*first), words, None)
            packing = Packing.of(
                streams.prefix.lengths,
                inputs.device,
                prefix=None if start is None else start.prefix.repeat(len(read)),
                record=bool(streams.suffix.lengths),
                sent=first_sequences,
            )
            parts.append(model.hidden_states(inputs, packing))
        if packing.recorded is not None:
            # The recorded keys and values are constants: the backward pass ends here.
            before = packing.recorded.take(
                streams.follows, otherwise=None if start is None else start.prefix
            )
    drawn = words.new_zeros(0)
    if streams.suffix.lengths:
        places = Places(*second)
        visual = gill.visual_prefix(batch.pooled[shown]).flatten(0, 1)
        # One row of E_img per use, in its own dtype: their gradients are summed in that dtype.
        images = gill.heads.image_embeddings.expand(len(streams.drawn), -1, -1).flatten(0, 1)
        filling = torch.cat([visual, images.to(visual.dtype)])
        packing = Packing.of(
            streams.suffix.lengths, words.device, prefix=before, sent=second_sequences
        )
        hidden = model.hidden_states(gill.inputs(places, words, filling), packing)
        drawn = places.filled[len(visual) :] + sum(map(len, parts))
        parts.append(hidden)
    # [S, e] over start, prefixes and suffixes, as `Predictions` count places.
    states = torch.cat(parts)
    constant_words, dependent_words, constant_image, dependent_image = (
        Supervised(from_states.index_select(0, predictors), words[targets])
        for from_states, (predictors, targets) in zip(
            (states.detach(), states) * 2, predicted, strict=True
        )
    )
    return DocumentStates(
        drawn=states.index_select(0, drawn).unflatten(0, (len(streams.drawn), sizes.r)),
        words=(constant_words, dependent_words),
        image_token=(constant_image, dependent_image),
    )


def _pictures(batch: DocumentBatch) -> Int64[Tensor, " Q"]:
    [drawn] = sent_together([batch.drawn], batch.pooled.device)
    return drawn


def _words_sum(
    gill: MultimodalLanguageModel, pair: tuple[Supervised, Supervised], images: bool
) -> Tensor:
    model = gill.language_model
    embeddings = gill.heads.image_embeddings if images else None
    sums = [
        cross_entropy_sum(
            part.hidden, part.targets, model.output_rows, model.output_bias, embeddings
        )
        for part in pair
        if len(part.targets)
    ]
    return sum(sums, start=gill.heads.logit_scale.new_zeros(()))


def _image_token_sum(gill: MultimodalLanguageModel, pair: tuple[Supervised, Supervised]) -> Tensor:
    model, images = gill.language_model, gill.heads.image_embeddings
    rows, bias = model.output_rows, model.output_bias
    total = gill.heads.logit_scale.new_zeros(())
    for part, loss in zip(pair, (constant_cross_entropy_sum, cross_entropy_sum)):
        if len(part.targets):
            total = total + loss(part.hidden, part.targets, rows, bias, images)
    return total


def _quotient(total: Tensor, divisor: float | int) -> Tensor:
    """`total` is zero where there is nothing to divide by."""
    return total / divisor if divisor else total
