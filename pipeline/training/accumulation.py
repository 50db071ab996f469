"""One step's gradient, with the language model reading the batch in parts.

    first, no gradient    every part ─ queries ┐
    whole batch                      l_r over all queries and keys ─ gradient of the queries, kept
    then, part by part    losses + queries · kept gradient ─ backward, and what it held is freed

Every loss but retrieval is a sum over examples or tokens, so the parts need only be divided by the
whole batch's numbers. Retrieval compares every text with every picture of the batch: its gradient
with respect to the queries is all that a part must know of the others (GradCache, Gao et al. 2021).
The step is that of the whole batch but for rounding; it reads the texts twice.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch, take_examples
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import (
    Divisors,
    Losses,
    PackingDraws,
    contrastive_losses,
    example_losses,
    retrieval_queries,
    training_losses,
)
from pipeline.settings import Objective
from pipeline.training.distribution import is_distributed, mean_over_processes


def backpropagate(
    gill: MultimodalLanguageModel,
    batch: CaptionBatch,
    objective: Objective,
    draws: PackingDraws,
    micro_batch_size: int | None = None,
) -> Losses:
    """Add the gradient of `training_losses` to the heads' `.grad`; returns the losses, detached.

    Under several processes `batch` and `draws` are this process's part, equally many examples in
    each, and both the losses and the gradients are such that their means over the processes are
    those of the global batch.

    Args:
        micro_batch_size: examples that go through the language model at once, an even number; the
            last part may be smaller. None: all.

    Raises:
        ValueError: `micro_batch_size` is odd and would cut a pair; and as `training_losses`.
    """
    size = len(batch) if micro_batch_size is None else micro_batch_size
    if size < len(batch) and size % 2:
        raise InputError(f"micro_batch_size is {size}: an odd one would cut packed pairs in two")
    # Of the whole batch, before it is cut: parts divided by their own counts would not add up.
    divisors = _shared(Divisors.of(gill, batch.lengths, objective, draws), objective)
    if size >= len(batch):
        # All in one part: the texts need be read only once.
        losses = training_losses(gill, batch, objective, draws, divisors)
        losses.total.backward()
        return _detached(losses)

    # `size` is even, so a part begins at the first of a pair.
    bounds = [(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
    parts = [(take_examples(batch, *bound), draws.part(*bound)) for bound in bounds]
    terms = None
    grads: list[Tensor | None] = [None] * len(parts)
    if objective.retrieval_weight:
        with torch.no_grad():
            queries = [retrieval_queries(gill, part, objective, own) for part, own in parts]
        # grad [B, p]: what each query's vector has to know of all other examples.
        *terms, grad = _retrieval(gill, batch, objective, torch.cat(queries))
        grads = [grad[slice(*bound)] for bound in bounds]
    shares = [
        _backpropagate_part(gill, part, objective, own, divisors, grad)
        for (part, own), grad in zip(parts, grads)
    ]
    losses = _sum(shares)
    return losses if terms is None else losses.with_retrieval(objective, *terms)


def _retrieval(
    gill: MultimodalLanguageModel,
    batch: CaptionBatch,
    objective: Objective,
    queries: Float[Tensor, "B p"],
) -> tuple[Tensor, Tensor, Float[Tensor, "B p"]]:
    """Both terms of l_r, and their weighted gradient with respect to `queries`.

    Gradients of keys and temperature, which need no language model, go to their parameters.
    """
    # A leaf: this backward pass ends here, and the language model is not run again for it.
    queries.requires_grad_()
    terms = contrastive_losses(gill, objective, queries, gill.image_key(batch.pooled))
    (objective.retrieval_weight * (terms[0] + terms[1])).backward()
    assert queries.grad is not None
    return terms[0].detach(), terms[1].detach(), queries.grad


def _backpropagate_part(
    gill: MultimodalLanguageModel,
    part: CaptionBatch,
    objective: Objective,
    draws: PackingDraws,
    divisors: Divisors,
    grad: Float[Tensor, "B p"] | None,
) -> Losses:
    losses, queries = example_losses(gill, part, objective, draws, divisors)
    total = losses.total
    if queries is not None and grad is not None:
        # Its gradient is that of l_r through these queries; its value means nothing.
        total = total + (queries * grad).sum()
    total.backward()
    return _detached(losses)


def _shared(divisors: Divisors, objective: Objective) -> Divisors:
    """Means over processes, so that a mean of quotients is the quotient of the sums."""
    if not is_distributed() or objective.token_reduction != "tokens":
        return divisors
    counts = torch.tensor([divisors.captioning, *divisors.image_token], dtype=torch.float64)
    captioning, *image_token = mean_over_processes(counts).tolist()
    return replace(divisors, captioning=captioning, image_token=tuple(image_token))


def _detached(losses: Losses) -> Losses:
    return replace(losses, **{n: getattr(losses, n).detach() for n in _parts_of(losses)})


def _sum(shares: list[Losses]) -> Losses:
    names = _parts_of(shares[0])
    return Losses(**{n: torch.stack([getattr(s, n) for s in shares]).sum() for n in names})


def _parts_of(losses: Losses) -> list[str]:
    """The losses that the objective has, by name."""
    return [field.name for field in fields(losses) if getattr(losses, field.name) is not None]
