"""The training objective: every difference between the paper and the released code is one switch.

`training_losses` is the fast step. It is equal to the plain formulation (three padded passes, full
logits), and never runs the visual encoder, pads, or keeps a [tokens, vocabulary] tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
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
from pipeline.streams import pair_rows


class Objective(BaseModel):
    """What is minimised. The defaults are `Objective.paper()`; `Objective.released()` is the code
    that produced the published numbers. Numbers in brackets are items of UPSTREAM.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    captioning_weight: float = Field(
        default=1.0, ge=0, description="weight of l_c (Eq. 5); 0 leaves its pass out"
    )
    image_token_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of l_p (Eq. 5). The released code counts it twice with 0.5 (4): also 1",
    )
    retrieval_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of l_r, the sum of the two terms of Eq. 4. Released: 0.5, their mean "
        "(7). 0 trains for generation only",
    )
    generation_weight: float = Field(
        default=1.0, ge=0, description="weight of l_g (Eq. 3); 0 trains for retrieval only"
    )
    token_reduction: Literal["examples", "tokens"] = Field(
        default="examples",
        description="examples: sum over the tokens of a caption, mean over examples (Eq. 1 and 5). "
        "tokens: mean over all supervised tokens of the batch, as released (1)",
    )
    supervise_start: bool = Field(
        default=False,
        description="predict the start id from the last visual token: released (2), not in Eq. 1",
    )
    captioning_softmax: Literal["words", "words_and_images"] = Field(
        default="words",
        description="words: p_theta of Eq. 1, over the frozen vocabulary. words_and_images: the "
        "[IMG] rows share the softmax, so that l_c trains E_img too, as released (11)",
    )
    image_token_targets: Literal["image_token", "caption_and_image_token"] = Field(
        default="image_token",
        description="image_token: Eq. 2, [IMG1] alone. caption_and_image_token: every caption "
        "token as well, without any image, as released (3)",
    )
    supervise_second: bool = Field(
        default=True,
        description="l_p also for the second caption of a packed pair. Released: false, because "
        "its label mask stops at the first [IMG1] of a row; an accident (5)",
    )
    generation_loss: Literal["squared_error", "distance"] = Field(
        default="squared_error",
        description="squared_error: mean over all elements, the 'MSE' of section 3.2 (the sum "
        "printed in Eq. 3 is L * D times this). distance: L2 norm per position, not squared, as "
        "released (6)",
    )
    mapper_adds_embedding: bool = Field(
        default=False,
        description="the mapper reads hidden state + input embedding, as released (13); Eq. 3: "
        "hidden states alone. A property of the trained heads: must agree with theirs",
    )
    learn_temperature: bool = Field(
        default=True,
        description="train log(1/tau). As released (8); Eq. 5 does not list tau, but the paper "
        "gives no value to fix it at",
    )
    contrastive_gradient: Literal["global", "divided"] = Field(
        default="global",
        description="global: l_r's true gradient over the batch of all ranks. divided: 1/W of it "
        "on W ranks, as released; an accident (12). Same on one rank",
    )
    pack_probability: float = Field(
        default=0.5, ge=0, le=1, description="how often two examples share a sequence (section 3.4)"
    )
    packing_unit: Literal["pair", "batch"] = Field(
        default="pair",
        description="what a coin decides. pair: each two neighbours, the paper's 'two random "
        "examples with probability 0.5'. batch: the whole batch, as released (22)",
    )
    separate_image_draws: bool = Field(
        default=False,
        description="retrieval and generation toss their own coins, as released (22); then a batch "
        "may need two passes. false: one coin and one pass for both. Each loss has the same "
        "distribution either way, only their joint randomness differs, so both presets say false",
    )
    rescale_image_rows: bool = Field(
        default=False,
        description="after each step scale the rows of E_img to the mean norm of the frozen rows: "
        "released (31), not in the paper. Applied by training",
    )
    trained_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of trained parameters and optimiser state. bfloat16 is what the "
        "released code kept (32): small steps are rounded away and the temperature cannot move; an "
        "accident, so both presets say float32. Applied by training",
    )

    @classmethod
    def paper(cls) -> "Objective":
        """Equations 1 to 5 as printed."""
        return cls()

    @classmethod
    def released(cls) -> "Objective":
        """The released code, on one GPU, with float32 parameters."""
        return cls(
            retrieval_weight=0.5,
            token_reduction="tokens",
            supervise_start=True,
            captioning_softmax="words_and_images",
            image_token_targets="caption_and_image_token",
            supervise_second=False,
            generation_loss="distance",
            mapper_adds_embedding=True,
            packing_unit="batch",
            rescale_image_rows=True,
        )


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
            a sequence exceeds the language model's positions; pooled targets are missing.
    """
    _check_mapper_input(gill, objective)
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
