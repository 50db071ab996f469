"""The training objective: every difference between the paper and the released code is one switch.

`training_losses` is the fast step. It is equal to the plain formulation (three padded passes, full
logits), and never runs the visual encoder, pads, or keeps a [tokens, vocabulary] tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.batch import CaptionBatch
from pipeline.gill import Gill, ImageTokens
from pipeline.losses import (
    constant_cross_entropy_sum,
    cross_entropy_sum,
    info_nce,
    mean_distance,
    mean_squared_error,
)
from pipeline.settings import Objective
from pipeline.streams import pair_rows


@dataclass(frozen=True)
class PackingDraws:
    """Which pairs (2i, 2i + 1) share a sequence, for each use; one entry per complete pair."""

    captioning: Sequence[bool]
    retrieval: Sequence[bool]
    generation: Sequence[bool]

    @classmethod
    def same(cls, num_examples: int, packed: bool) -> "PackingDraws":
        """Every pair packed, or none."""
        pairs = [packed] * (num_examples // 2)
        return cls(pairs, pairs, pairs)


def draw_packing(
    num_examples: int, objective: Objective, generator: torch.Generator
) -> PackingDraws:
    """Toss the coins of one step; three times as many numbers are drawn whatever the objective."""
    pairs = num_examples // 2
    coins = torch.rand(3, max(pairs, 1), generator=generator)
    if objective.packing_unit == "batch":
        coins = coins[:, :1].expand(-1, max(pairs, 1))
    captioning, retrieval, generation = (coins[:, :pairs] < objective.pack_probability).tolist()
    return PackingDraws(
        captioning, retrieval, generation if objective.separate_image_draws else retrieval
    )


@dataclass(frozen=True)
class Losses:
    """The parts, unweighted (a part with weight 0 is reported as 0), and their weighted sum."""

    total: Float[Tensor, ""]
    captioning: Float[Tensor, ""]
    image_token: Float[Tensor, ""]
    text_to_image: Float[Tensor, ""]
    """First term of Eq. 4: the picture among all, given the text."""
    image_to_text: Float[Tensor, ""]
    generation: Float[Tensor, ""]
    pooled: Float[Tensor, ""]
    """Of the pooled text vector, for generators that need one; weighted like `generation`."""


def training_losses(
    gill: Gill, batch: CaptionBatch, objective: Objective, draws: PackingDraws
) -> Losses:
    """All losses of one step.

    Examples 2i and 2i + 1 of `batch` share sequences where `draws` says so. Retrieval and
    generation share one pass unless their draws differ.

    >>> losses = training_losses(gill, batch, Objective.released(), draw_packing(len(batch), ...))
    >>> losses.total.backward()

    Raises:
        ValueError: the heads' mapper input contradicts the objective; `draws` do not fit the batch;
            a sequence exceeds the language model's positions; pooled targets are missing; the
            language model is in float16, in which gradients underflow.
    """
    _check_mapper_input(gill, objective)
    if gill.language_model.dtype == torch.float16:
        raise ValueError(
            "the language model is in float16, in which gradients underflow: train with bfloat16 "
            "or float32"
        )
    zero = gill.heads.logit_scale.new_zeros(())
    captioning = image_token = text_to_image = image_to_text = generation = pooled = zero
    if objective.captioning_weight:
        captioning = _captioning_loss(gill, batch, objective, draws.captioning)

    wants_retrieval = objective.retrieval_weight > 0
    wants_generation = objective.generation_weight > 0
    uses = [draws.retrieval] * wants_retrieval + [draws.generation] * wants_generation
    if not uses and objective.image_token_weight:
        uses = [draws.retrieval]
    passes: list[tuple[list[bool], ImageTokens]] = []
    for packed in map(list, uses):
        if packed not in [drawn for drawn, _ in passes]:
            passes.append((packed, _image_pass(gill, batch, objective, packed)))
    hidden = {tuple(packed): tokens.hidden for packed, tokens in passes}
    if objective.image_token_weight:
        image_token = torch.stack(
            [_image_token_loss(gill, len(batch), objective, tokens) for _, tokens in passes]
        ).mean()
    if wants_retrieval:
        text_to_image, image_to_text = _retrieval_losses(
            gill, batch, objective, hidden[tuple(draws.retrieval)]
        )
    if wants_generation:
        states = hidden[tuple(draws.generation)]
        distance = _DISTANCES[objective.generation_loss]
        generation = distance(gill.generation_embedding(states), batch.targets)
        if gill.heads.pooled_projection is not None:
            if batch.pooled_targets is None:
                raise ValueError(
                    "the heads have a pooled projection, but the batch no pooled targets"
                )
            pooled = distance(gill.generation_pooled(states), batch.pooled_targets)

    total = (
        objective.captioning_weight * captioning
        + objective.image_token_weight * image_token
        + objective.retrieval_weight * (text_to_image + image_to_text)
        + objective.generation_weight * (generation + pooled)
    )
    return Losses(total, captioning, image_token, text_to_image, image_to_text, generation, pooled)


_DISTANCES = {"squared_error": mean_squared_error, "distance": mean_distance}


def _check_mapper_input(gill: Gill, objective: Objective) -> None:
    sizes = gill.heads.sizes.mapper
    if sizes.kind == "gill_mapper" and sizes.adds_embedding != objective.mapper_adds_embedding:
        raise ValueError(
            f"objective.mapper_adds_embedding is {objective.mapper_adds_embedding}, but the heads "
            f"were made with mapper.adds_embedding = {sizes.adds_embedding}: set both alike"
        )


def _captioning_loss(
    gill: Gill, batch: CaptionBatch, objective: Objective, packed: Sequence[bool]
) -> Tensor:
    model = gill.language_model
    rows = pair_rows(len(batch), packed)
    supervised = gill.caption(batch, rows, objective.supervise_start)
    with_images = objective.captioning_softmax == "words_and_images"
    total = cross_entropy_sum(
        supervised.hidden,
        supervised.targets,
        model.output_rows,
        model.output_bias,
        gill.heads.image_embeddings if with_images else None,
    )
    by_token = objective.token_reduction == "tokens"
    return total / (len(supervised.targets) if by_token else len(batch))


def _image_pass(
    gill: Gill, batch: CaptionBatch, objective: Objective, packed: Sequence[bool]
) -> ImageTokens:
    return gill.image_tokens(
        batch,
        pair_rows(len(batch), packed),
        supervise_captions=objective.image_token_targets == "caption_and_image_token",
        supervise_second=objective.supervise_second,
    )


def _image_token_loss(
    gill: Gill, num_examples: int, objective: Objective, tokens: ImageTokens
) -> Tensor:
    model, images = gill.language_model, gill.heads.image_embeddings
    rows, bias = model.output_rows, model.output_bias
    constant, dependent = tokens.constant, tokens.dependent
    total = constant_cross_entropy_sum(constant.hidden, constant.targets, rows, bias, images)
    count = len(constant.targets)
    if dependent is not None:
        total = total + cross_entropy_sum(dependent.hidden, dependent.targets, rows, bias, images)
        count += len(dependent.targets)
    return total / (count if objective.token_reduction == "tokens" else num_examples)


def _retrieval_losses(
    gill: Gill, batch: CaptionBatch, objective: Objective, hidden: Float[Tensor, "B r e"]
) -> tuple[Tensor, Tensor]:
    scale: Tensor = gill.heads.logit_scale
    if not objective.learn_temperature:
        scale = scale.detach()
    keys = gill.image_key(batch.pooled)
    queries = gill.text_query(hidden)
    return info_nce(queries, keys, scale, objective.contrastive_gradient == "divided")
