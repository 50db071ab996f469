"""One optimiser step on the heads: gradients of all micro-batches and processes, clip, AdamW."""

from __future__ import annotations

import math

import torch

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.image_tokens import rescale_image_rows
from pipeline.bridge.mixed_batch import MixedBatch
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws
from pipeline.settings import Objective, TrainingSettings
from pipeline.training.accumulation import backpropagate
from pipeline.training.distribution import (
    average_gradients,
    complete_gradients,
    mean_over_processes,
)
from pipeline.training.recomputation import recompute_activations
from pipeline.training.sharding import is_sharded
from pipeline.training.validation import loss_values


class NonFiniteStepError(Exception):
    """A step whose loss or gradient is not finite; `values` are its numbers."""

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__(f"not finite: {values}")
        self.values = values


class Stepper:
    """Optimiser steps on one model: AdamW over every trained tensor, `E_img` at a rate of its own.

    The heads are put into the objective's `trained_dtype`; the language model recomputes its
    activations from now on, where `settings` say so.

    Raises:
        ValueError: `settings.shard_language_model` is not how the language model was loaded, or
            does not go with the objective.
        BackboneError: this language model's activations cannot be recomputed.
    """

    def __init__(
        self, gill: MultimodalLanguageModel, objective: Objective, settings: TrainingSettings
    ) -> None:
        _refuse_unfit_sharding(gill, objective, settings)
        self.gill, self.objective, self.settings = gill, objective, settings
        if settings.recompute_activations:
            recompute_activations(gill.language_model)
        gill.heads.to(getattr(torch, objective.trained_dtype))
        image_embeddings = gill.heads.image_embeddings
        others = [p for p in gill.heads.parameters() if p is not image_embeddings]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [image_embeddings], "rate_factor": settings.image_token_rate},
                {"params": others, "rate_factor": 1.0},
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        self._mean_row_norm = gill.language_model.mean_row_norm()

    def take(
        self, step: int, batch: CaptionBatch | MixedBatch, draws: PackingDraws
    ) -> dict[str, float]:
        """Step number `step`, from 0; returns loss, parts, gradient norm before clipping, rate.

        Under several processes `batch` and `draws` are this process's part and the step is that of
        the global batch: all return the same and change their heads alike.

        Raises NonFiniteStepError before anything is changed.
        """
        settings = self.settings
        # None, not zero: AdamW leaves alone what no loss reaches, decay included.
        self.optimizer.zero_grad(set_to_none=True)
        losses = backpropagate(self.gill, batch, self.objective, draws, settings.micro_batch_size)
        if isinstance(batch, MixedBatch):
            # Documents without a picture to produce reach fewer of the heads.
            complete_gradients(list(self.gill.heads.parameters()))
        parameters = [p for p in self.gill.heads.parameters() if p.grad is not None]
        # Before clipping: the norm is the global batch's, so that all processes clip alike.
        average_gradients(parameters)
        limit = float("inf") if settings.clip_norm is None else settings.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        parts = loss_values(losses)
        means = mean_over_processes(torch.stack([part.float() for part in parts.values()]))
        # The one wait for the device.
        numbers = torch.cat([means, norm.float()[None]]).tolist()
        values = dict(zip([*parts, "gradient_norm"], numbers))
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteStepError(values)
        # By the step's number alone: there is no scheduler whose state a resumed run would need.
        rate = settings.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.optimizer.step()
        if self.objective.rescale_image_rows:
            rescale_image_rows(self.gill.heads.image_embeddings, self._mean_row_norm)
        return values | {"learning_rate": rate}


def _refuse_unfit_sharding(
    gill: MultimodalLanguageModel, objective: Objective, settings: TrainingSettings
) -> None:
    sharded = is_sharded(gill.language_model)
    if sharded != settings.shard_language_model:
        raise InputError(
            f"run.shard_language_model is {settings.shard_language_model}, but the language "
            f"model was loaded {'sharded' if sharded else 'whole'}: see pipeline.training.sharding"
        )
    if sharded and objective.separate_image_draws:
        raise InputError(
            "objective.separate_image_draws lets processes run different numbers of passes, but "
            "those of a sharded language model run all passes together: turn one of them off"
        )
