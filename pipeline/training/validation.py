"""Losses and recall on held-out rows, and which rows of a batch are to blame for a bad loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.bridge.batch import CaptionBatch, take_examples
from pipeline.bridge.document_objective import document_losses, document_queries
from pipeline.bridge.documents import DocumentBatch
from pipeline.bridge.mixed_batch import MixedBatch
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import Losses, PackingDraws, training_losses
from pipeline.bridge.streams import pair_rows
from pipeline.settings import Objective


@torch.no_grad()
def validate(
    gill: MultimodalLanguageModel,
    batches: Sequence[CaptionBatch | DocumentBatch],
    objective: Objective,
    contents: Int64[Tensor, " N"] | None = None,
) -> dict[str, float]:
    """Losses and recall on held-out rows, unpacked.

    Losses are means over examples. Retrieval is over all rows of all batches at once (of documents,
    over every picture that is to be produced): its two losses, and R@1 of pictures given texts
    (`text_to_image_r1`) and of texts given pictures.

    `contents` are equal for rows whose pictures show the same: each of them is then a hit for the
    others' texts, and the reverse. None: no two show the same. The losses know of none.
    """
    # Retrieval is measured below, over all rows; without it no process waits for another here.
    alone = objective.model_copy(update={"retrieval_weight": 0.0})
    sums: dict[str, float] = {}
    queries, keys = [], []
    for batch in batches:
        batch = batch.to(gill.language_model.device)
        if isinstance(batch, DocumentBatch):
            losses = document_losses(gill, batch, alone)
        else:
            draws = PackingDraws.same(len(batch), packed=False)
            losses = training_losses(gill, batch, alone, draws)
        for name, value in loss_values(losses).items():
            # The last batch may be smaller: each counts by its examples.
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
        query, key = _retrieval_vectors(gill, batch)
        queries.append(query)
        keys.append(key)
    total = sum(map(len, batches))
    means = {name: value / total for name, value in sums.items()}
    # [N, N] over all batches, texts down, pictures across: R@1 among N candidates, not among B.
    scores = torch.cat(queries) @ torch.cat(keys).T
    own = torch.arange(len(scores), device=scores.device)
    shown = own if contents is None else contents.to(scores.device)
    logits = gill.heads.logit_scale.float().exp() * scores
    to_image = float(F.cross_entropy(logits, own))
    to_text = float(F.cross_entropy(logits.T, own))
    return means | {
        "loss": means["loss"] + objective.retrieval_weight * (to_image + to_text),
        "text_to_image": to_image,
        "image_to_text": to_text,
        "text_to_image_r1": float((shown[scores.argmax(dim=1)] == shown).float().mean()),
        "image_to_text_r1": float((shown[scores.argmax(dim=0)] == shown).float().mean()),
    }


@torch.no_grad()
def guilty_rows(
    gill: MultimodalLanguageModel, batch: CaptionBatch | MixedBatch, objective: Objective
) -> list[int]:
    """Rows whose own inputs, vectors or losses are not finite; of a document, its pictures'."""
    if isinstance(batch, MixedBatch):
        captions, documents = batch.captions, batch.documents
        guilty = [] if captions is None else guilty_rows(gill, captions, objective)
        return guilty + ([] if documents is None else _guilty_pictures(gill, documents, objective))
    alone = objective.model_copy(update={"retrieval_weight": 0.0})
    guilty = []
    # One example at a time: in a batch one bad row would make every mean bad.
    for i in range(len(batch)):
        one = take_examples(batch, i, i + 1)
        losses = training_losses(gill, one, alone, PackingDraws.same(1, packed=False))
        inputs = [one.pooled, one.targets, *_retrieval_vectors(gill, one), losses.total]
        if not all(bool(x.isfinite().all()) for x in inputs):
            guilty.append(int(one.rows[0]))
    return guilty


def _guilty_pictures(
    gill: MultimodalLanguageModel, batch: DocumentBatch, objective: Objective
) -> list[int]:
    """Rows of pictures that are not finite; where none is, of those in a document whose loss is."""
    alone = objective.model_copy(update={"retrieval_weight": 0.0})
    guilty: set[int] = set()
    for number in range(len(batch)):
        one = batch.part(number, number + 1)
        vectors = [one.targets, one.pooled, gill.image_key(one.pooled)]
        bad = torch.stack([~x.flatten(1).isfinite().all(dim=1) for x in vectors]).any(dim=0)
        if not bad.any() and not document_losses(gill, one, alone).total.isfinite():
            bad[:] = True
        guilty |= set(one.rows[bad].tolist())
    return sorted(guilty)


def loss_values(losses: Losses) -> dict[str, Tensor]:
    """The total as `loss`, then its parts; the pooled one only where it is used."""
    parts = {field.name: getattr(losses, field.name).detach() for field in fields(losses)}
    loss = parts.pop("total")
    return {"loss": loss, **parts}


def _retrieval_vectors(
    gill: MultimodalLanguageModel, batch: CaptionBatch | DocumentBatch
) -> tuple[Float[Tensor, "B p"], Float[Tensor, "B p"]]:
    """Queries and keys of unpacked examples."""
    if isinstance(batch, DocumentBatch):
        return document_queries(gill, batch), gill.image_key(batch.pooled[batch.drawn])
    rows = pair_rows(len(batch), [False] * (len(batch) // 2))
    tokens = gill.image_tokens(batch, rows, supervise_captions=False, supervise_second=False)
    return gill.text_query(tokens.hidden), gill.image_key(batch.pooled)
