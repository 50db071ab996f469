"""One step's gradient, with the language model reading the batch in parts.

    part by part          captioning loss ─ backward, and what it held is freed
    then, no gradient     every part ─ queries ┐
    whole batch                      l_r over all queries and keys ─ gradient of the queries, kept
    then, part by part    image losses + queries · kept gradient ─ backward, and so on

The captioning pass and the image pass share nothing but parameters: never both are held. Every loss
but retrieval is a sum over examples or tokens, so the parts need only be divided by the whole
batch's numbers. Retrieval compares every text with every picture of the batch: its gradient with
respect to the queries is all that a part must know of the others (GradCache, Gao et al. 2021). The
step is that of the whole batch but for rounding; in several parts it reads the texts twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial, reduce

import torch
from torch import Tensor

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch, take_examples
from pipeline.bridge.document_objective import (
    document_contrast,
    document_divisors,
    document_queries,
    document_shares,
)
from pipeline.bridge.documents import DocumentBatch
from pipeline.bridge.mixed_batch import MixedBatch, corpora_of
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import (
    Divisors,
    Losses,
    PackingDraws,
    captioning_loss,
    contrastive_losses,
    image_losses,
    retrieval_queries,
)
from pipeline.settings import Objective
from pipeline.training.distribution import is_distributed, mean_over_processes


def backpropagate(
    gill: MultimodalLanguageModel,
    batch: CaptionBatch | MixedBatch,
    objective: Objective,
    draws: PackingDraws,
    micro_batch_size: int | None = None,
) -> Losses:
    """Add the gradient of `training_losses` to the heads' `.grad`; returns the losses, detached.

    Of a mixed batch, those of its captions and of its documents, weighted by their shares.

    Under several processes `batch` and `draws` are this process's part, equally many examples of a
    corpus in each, and both the losses and the gradients are such that their means over the
    processes are those of the global batch.

    Args:
        micro_batch_size: examples that go through the language model at once, an even number; the
            last part may be smaller. None: all.

    Raises:
        ValueError: `micro_batch_size` is odd and would cut a pair; and as `training_losses` and
            `document_losses`.
    """
    shares = []
    for corpus in corpora_of(batch):
        size = len(corpus) if micro_batch_size is None else micro_batch_size
        parts = (
            _caption_parts(gill, corpus, objective, draws, size)
            if isinstance(corpus, CaptionBatch)
            else _document_parts(gill, corpus, objective, size)
        )
        shares.append(_accumulate(parts, objective, len(corpus) / len(batch)))
    return shares[0] if len(shares) == 1 else _sum(shares)


@dataclass(frozen=True)
class _Parts:
    """The parts of a batch, and what compares all of their queries."""

    captioning: list[Callable[[], Tensor]]
    """Per part its share of l_c, where that has a pass of its own."""
    losses: list[Callable[[], tuple[Losses, Tensor | None]]]
    """Per part its share of the others, and its queries where the objective has retrieval."""
    queries: list[Callable[[], Tensor]]
    """Per part the queries alone."""
    contrast: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Both terms of l_r, from the queries of all parts."""


def _caption_parts(
    gill: MultimodalLanguageModel,
    batch: CaptionBatch,
    objective: Objective,
    draws: PackingDraws,
    size: int,
) -> _Parts:
    if size < len(batch) and size % 2:
        raise InputError(f"micro_batch_size is {size}: an odd one would cut packed pairs in two")
    # Of the whole batch, before it is cut: parts divided by their own counts would not add up.
    divisors = _shared(Divisors.of(gill, batch.lengths, objective, draws), objective)
    # `size` is even, so a part begins at the first of a pair.
    parts = [
        (take_examples(batch, *bound), draws.part(*bound)) for bound in _bounds(len(batch), size)
    ]
    return _Parts(
        [
            partial(captioning_loss, gill, part, objective, own, divisors)
            for part, own in parts
            if objective.captioning_weight
        ],
        [partial(image_losses, gill, part, objective, own, divisors) for part, own in parts],
        [partial(retrieval_queries, gill, part, objective, own) for part, own in parts],
        lambda queries: contrastive_losses(gill, objective, queries, gill.image_key(batch.pooled)),
    )


def _document_parts(
    gill: MultimodalLanguageModel, batch: DocumentBatch, objective: Objective, size: int
) -> _Parts:
    divisors = _shared_counts(document_divisors(gill, batch, objective))
    parts = [batch.part(*bound) for bound in _bounds(len(batch), size)]
    return _Parts(
        [],  # read in one pass
        [partial(document_shares, gill, part, objective, divisors) for part in parts],
        [partial(document_queries, gill, part) for part in parts],
        lambda queries: document_contrast(gill, batch, objective, queries),
    )


def _bounds(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _accumulate(parts: _Parts, objective: Objective, weight: float) -> Losses:
    """Add the gradient of `weight` times the losses; returns so much of the losses, detached."""
    captioning = [
        _backward(part(), weight * objective.captioning_weight) for part in parts.captioning
    ]
    add = _add_whole if len(parts.losses) == 1 else _add_part_by_part
    losses = add(parts, objective, weight)
    if not captioning:
        return losses
    return losses.with_captioning(objective, _times(weight, reduce(torch.add, captioning)))


def _add_whole(parts: _Parts, objective: Objective, weight: float) -> Losses:
    """The image pass in one part, whose texts need be read only once."""
    losses, queries = parts.losses[0]()
    if queries is not None:
        losses = losses.with_retrieval(objective, *parts.contrast(queries))
    _backward(losses.total, weight)
    return _scaled(losses, weight)


def _add_part_by_part(parts: _Parts, objective: Objective, weight: float) -> Losses:
    terms = None
    grads: list[Tensor | None] = [None] * len(parts.losses)
    if objective.retrieval_weight:
        with torch.no_grad():
            queries_of_parts = [queries() for queries in parts.queries]
        # A leaf: this backward pass ends here, and the language model is not run again for it.
        # Gradients of keys and temperature, which need none, go to their parameters.
        leaf = torch.cat(queries_of_parts).requires_grad_()
        terms = parts.contrast(leaf)
        _backward(terms[0] + terms[1], weight * objective.retrieval_weight)
        assert leaf.grad is not None
        # What each query's vector has to know of all other examples.
        grads = list(leaf.grad.split([len(queries) for queries in queries_of_parts]))
    shares = []
    for part, grad in zip(parts.losses, grads):
        losses, queries = part()
        total = _times(weight, losses.total)
        if queries is not None and grad is not None:
            # Its gradient is that of l_r through these queries; its value means nothing.
            total = total + (queries * grad).sum()
        _backward(total)
        shares.append(_scaled(losses, weight))
    losses = _sum(shares)
    if terms is None:
        return losses
    return losses.with_retrieval(objective, *(weight * term.detach() for term in terms))


def _backward(loss: Tensor, weight: float = 1.0) -> Tensor:
    """Add the gradient of `weight` times a loss, and let go of what it held; returns the loss.

    Documents without anything to learn leave no gradient.
    """
    if loss.requires_grad:
        _times(weight, loss).backward()
    return loss.detach()


def _times(weight: float, loss: Tensor) -> Tensor:
    """A corpus alone has the weight 1, which costs no kernels."""
    return loss if weight == 1 else weight * loss


def _shared(divisors: Divisors, objective: Objective) -> Divisors:
    """Means over processes, so that a mean of quotients is the quotient of the sums."""
    if not is_distributed() or objective.token_reduction != "tokens":
        return divisors
    counts = torch.tensor([divisors.captioning, *divisors.image_token], dtype=torch.float64)
    captioning, *image_token = mean_over_processes(counts).tolist()
    return replace(divisors, captioning=captioning, image_token=tuple(image_token))


def _shared_counts(divisors: Divisors) -> Divisors:
    """Likewise of documents, of which processes hold any number of tokens and pictures."""
    if not is_distributed():
        return divisors
    counts = [divisors.captioning, *divisors.image_token, divisors.examples]
    means = mean_over_processes(torch.tensor(counts, dtype=torch.float64)).tolist()
    return Divisors(means[0], tuple(means[1:-1]), means[-1])


def _scaled(losses: Losses, weight: float) -> Losses:
    """Detached."""
    parts = {name: _times(weight, getattr(losses, name).detach()) for name in _parts_of(losses)}
    return replace(losses, **parts)


def _sum(shares: list[Losses]) -> Losses:
    names = _parts_of(shares[0])
    return Losses(**{n: torch.stack([getattr(s, n) for s in shares]).sum() for n in names})


def _parts_of(losses: Losses) -> list[str]:
    """The losses that the objective has, by name."""
    return [field.name for field in fields(losses) if getattr(losses, field.name) is not None]
