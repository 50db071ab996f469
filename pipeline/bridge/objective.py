"""The training objective: every difference between the paper and the released code is one switch.

`training_losses` is the fast step. It is equal to the plain formulation (three padded passes, full
logits), and never runs the visual encoder, pads, or keeps a [tokens, vocabulary] tensor.

All losses but retrieval are sums over examples or tokens: `captioning_loss` and `image_losses`
give the share of some examples in those of a whole batch, each by its own pass through the language
model. Retrieval compares all examples: `contrastive_losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.denoising import denoising_loss
from pipeline.bridge.losses import (
    constant_cross_entropy_sum,
    cross_entropy_sum,
    info_nce,
    mean_distance,
    mean_squared_error,
)
from pipeline.bridge.multimodal_language_model import ImageTokens, MultimodalLanguageModel
from pipeline.bridge.streams import captioning_count, image_token_count, pair_rows
from pipeline.frozen.conditioning import Conditioning
from pipeline.settings import Objective


@dataclass(frozen=True)
class PackingDraws:
    """Which pairs (2i, 2i + 1) share a sequence, for each use; one entry per complete pair."""

    captioning: Sequence[bool]
    retrieval: Sequence[bool]
    generation: Sequence[bool]
    noise: Sequence[int] | None = None
    """Of each example the seed of all that is drawn for its denoising; None: its row's number."""

    @classmethod
    def same(cls, num_examples: int, packed: bool) -> PackingDraws:
        """Every pair packed, or none."""
        pairs = [packed] * (num_examples // 2)
        return cls(pairs, pairs, pairs)

    def part(self, start: int, stop: int) -> PackingDraws:
        """Those of examples `start` to `stop`; `start` is even, so that no pair is cut."""
        pairs = slice(start // 2, stop // 2)
        return PackingDraws(
            list(self.captioning)[pairs],
            list(self.retrieval)[pairs],
            list(self.generation)[pairs],
            None if self.noise is None else self.noise[start:stop],
        )


def draw_packing(
    num_examples: int, objective: Objective, generator: torch.Generator
) -> PackingDraws:
    """Toss the coins of one step; three times as many numbers are drawn whatever the objective."""
    pairs = num_examples // 2
    # [3, pairs]: one row per use, all drawn whatever is used: another objective leaves the coins of
    # later steps as they are. One column even without a pair: `coins[:, :1]` must exist.
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
    diffusion: Float[Tensor, ""] | None = None
    """The generator's denoising loss; None where the objective has none."""

    def with_captioning(self, objective: Objective, captioning: Tensor) -> Losses:
        """The same with l_c, which was left out."""
        total = self.total + objective.captioning_weight * captioning
        return replace(self, total=total, captioning=captioning)

    def with_retrieval(
        self, objective: Objective, text_to_image: Tensor, image_to_text: Tensor
    ) -> Losses:
        """The same with the two terms of Eq. 4, which were left out."""
        return replace(
            self,
            total=self.total + objective.retrieval_weight * (text_to_image + image_to_text),
            text_to_image=text_to_image,
            image_to_text=image_to_text,
        )


@dataclass(frozen=True)
class Divisors:
    """What sums over tokens and examples are divided by to be means of a whole batch."""

    captioning: float | int
    image_token: tuple[float | int, ...]
    """One for each use of the image pass: retrieval, generation."""
    examples: float | int

    @classmethod
    def of(
        cls,
        gill: MultimodalLanguageModel,
        lengths: Sequence[int],
        objective: Objective,
        draws: PackingDraws,
    ) -> Divisors:
        """Those of captions of these lengths, by `objective.token_reduction`."""
        examples, uses = len(lengths), _image_uses(objective, draws)
        # Eq. 1 and 5: the tokens of a caption are summed, examples averaged. Otherwise the mean
        # over all supervised tokens (UPSTREAM 1).
        if objective.token_reduction == "examples":
            return cls(examples, (examples,) * len(uses), examples)
        num_start = len(gill.language_model.start_ids)
        return cls(
            captioning_count(
                lengths,
                pair_rows(examples, draws.captioning),
                num_start,
                objective.supervise_start,
            ),
            tuple(
                image_token_count(
                    lengths,
                    pair_rows(examples, packed),
                    num_start,
                    _supervises_captions(objective),
                    objective.supervise_second,
                )
                for packed in uses
            ),
            examples,
        )


def training_losses(
    gill: MultimodalLanguageModel,
    batch: CaptionBatch,
    objective: Objective,
    draws: PackingDraws,
    divisors: Divisors | None = None,
) -> Losses:
    """All losses of one step.

    Examples 2i and 2i + 1 of `batch` share sequences where `draws` says so. Retrieval and
    generation share one pass unless their draws differ. `divisors` are by default the batch's own.

    >>> losses = training_losses(gill, batch, Objective.released(), draw_packing(len(batch), ...))
    >>> losses.total.backward()

    Raises:
        ValueError: the heads' mapper input contradicts the objective; `draws` do not fit the batch;
            a sequence exceeds the language model's positions; pooled targets are missing; the
            language model is in float16, in which gradients underflow.
    """
    divisors = divisors or Divisors.of(gill, batch.lengths, objective, draws)
    losses, queries = image_losses(gill, batch, objective, draws, divisors)
    if objective.captioning_weight:
        captioning = captioning_loss(gill, batch, objective, draws, divisors)
        losses = losses.with_captioning(objective, captioning)
    if queries is None:
        return losses
    keys = gill.image_key(batch.pooled)
    return losses.with_retrieval(objective, *contrastive_losses(gill, objective, queries, keys))


def captioning_loss(
    gill: MultimodalLanguageModel,
    batch: CaptionBatch,
    objective: Objective,
    draws: PackingDraws,
    divisors: Divisors,
) -> Float[Tensor, ""]:
    """What these examples contribute to a whole batch's l_c.

    Summed over the parts of a batch, with the batch's divisors, the shares are its loss. Raises as
    `training_losses`.
    """
    refuse_float16(gill)
    model, packed = gill.language_model, pair_rows(len(batch), draws.captioning)
    supervised = gill.caption(batch, packed, objective.supervise_start)
    # Released: the [IMG] rows sit in the denominator here too, so l_c reaches E_img (UPSTREAM 11).
    with_images = objective.captioning_softmax == "words_and_images"
    total = cross_entropy_sum(
        supervised.hidden,
        supervised.targets,
        model.output_rows,
        model.output_bias,
        gill.heads.image_embeddings if with_images else None,
    )
    return total / divisors.captioning


def image_losses(
    gill: MultimodalLanguageModel,
    batch: CaptionBatch,
    objective: Objective,
    draws: PackingDraws,
    divisors: Divisors,
) -> tuple[Losses, Float[Tensor, "B p"] | None]:
    """What these examples contribute to a whole batch's losses by the image pass: l_p and l_g.

    Also the retrieval queries of the texts, where the objective has retrieval. Sums and raises as
    `captioning_loss`.
    """
    refuse_float16(gill)
    # What has weight 0 stays this zero, and its pass is not run.
    image_token = generation = pooled = zero = gill.heads.logit_scale.new_zeros(())
    diffusion: Tensor | None = None
    uses = _image_uses(objective, draws)
    # By packing: uses that are packed alike share a pass.
    passes: dict[tuple[bool, ...], ImageTokens] = {}
    for packed in uses:
        if packed not in passes:
            passes[packed] = _image_pass(gill, batch, objective, packed)
    if objective.image_token_weight:
        sums = {packed: _image_token_sum(gill, tokens) for packed, tokens in passes.items()}
        # Per use, not pass: a shared pass counts for both, like the released halves (UPSTREAM 4).
        means = [sums[packed] / count for packed, count in zip(uses, divisors.image_token)]
        image_token = torch.stack(means).mean()
    if _generates(objective):
        states = passes[tuple(draws.generation)].hidden
        has_pooled = gill.heads.pooled_projection is not None
        made = Conditioning(
            gill.generation_embedding(states),
            gill.generation_pooled(states) if has_pooled else None,
        )
        # A distance is a mean over these examples: by their share of the batch, parts add up.
        distance, share = DISTANCES[objective.generation_loss], len(batch) / divisors.examples
        if objective.generation_weight:
            generation = share * distance(made.embedding, batch.targets)
            if made.pooled is not None:
                if batch.pooled_targets is None:
                    raise InputError(
                        "the heads have a pooled projection, but the batch no pooled targets"
                    )
                pooled = share * distance(made.pooled, batch.pooled_targets)
        if objective.diffusion_weight:
            seeds = batch.rows.tolist() if draws.noise is None else draws.noise
            diffusion = share * denoising_loss(gill, batch, made, seeds, objective)
    queries = None
    if objective.retrieval_weight:
        queries = gill.text_query(passes[tuple(draws.retrieval)].hidden)

    # Without l_r: it needs the queries of the whole batch, and `with_retrieval` adds it.
    total = objective.image_token_weight * image_token
    total = total + objective.generation_weight * (generation + pooled)
    if diffusion is not None:
        total = total + objective.diffusion_weight * diffusion
    losses = Losses(total, zero, image_token, zero, zero, generation, pooled, diffusion)
    return losses, queries


def retrieval_queries(
    gill: MultimodalLanguageModel, batch: CaptionBatch, objective: Objective, draws: PackingDraws
) -> Float[Tensor, "B p"]:
    """The retrieval queries of `image_losses` alone."""
    return gill.text_query(_image_pass(gill, batch, objective, draws.retrieval).hidden)


def contrastive_losses(
    gill: MultimodalLanguageModel,
    objective: Objective,
    queries: Float[Tensor, "B p"],
    keys: Float[Tensor, "B p"],
    pictures: Int64[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Both terms of Eq. 4 over the batch of all processes, with the heads' temperature.

    `pictures` as `info_nce` takes it.
    """
    scale: Tensor = gill.heads.logit_scale
    if not objective.learn_temperature:
        scale = scale.detach()
    divided = objective.contrastive_gradient == "divided"
    return info_nce(queries, keys, scale, divided, pictures)


DISTANCES = {"squared_error": mean_squared_error, "distance": mean_distance}


def _image_uses(objective: Objective, draws: PackingDraws) -> list[tuple[bool, ...]]:
    """How each use of the image pass is packed; l_p is the mean over the uses."""
    uses: list[tuple[bool, ...]] = []
    if objective.retrieval_weight:
        uses.append(tuple(draws.retrieval))
    if _generates(objective):
        uses.append(tuple(draws.generation))
    # l_p alone still needs a pass, with the coins of either use.
    if not uses and objective.image_token_weight:
        uses.append(tuple(draws.retrieval))
    return uses


def _generates(objective: Objective) -> bool:
    return bool(objective.generation_weight or objective.diffusion_weight)


def _supervises_captions(objective: Objective) -> bool:
    return objective.image_token_targets == "caption_and_image_token"


def refuse_float16(gill: MultimodalLanguageModel) -> None:
    """Raise InputError for a language model in float16."""
    if gill.language_model.dtype == torch.float16:
        raise InputError(
            "the language model is in float16, in which gradients underflow: train with bfloat16 "
            "or float32"
        )


def _image_pass(
    gill: MultimodalLanguageModel, batch: CaptionBatch, objective: Objective, packed: Sequence[bool]
) -> ImageTokens:
    return gill.image_tokens(
        batch,
        pair_rows(len(batch), packed),
        supervise_captions=_supervises_captions(objective),
        supervise_second=objective.supervise_second,
    )


def _image_token_sum(gill: MultimodalLanguageModel, tokens: ImageTokens) -> Tensor:
    model, images = gill.language_model, gill.heads.image_embeddings
    rows, bias = model.output_rows, model.output_bias
    constant, dependent = tokens.constant, tokens.dependent
    # [IMG1] is a target, so the r [IMG] rows are in this softmax whatever the objective. Only
    # positions within second captions need a gradient to their hidden states.
    total = constant_cross_entropy_sum(constant.hidden, constant.targets, rows, bias, images)
    if dependent is not None:
        total = total + cross_entropy_sum(dependent.hidden, dependent.targets, rows, bias, images)
    return total
