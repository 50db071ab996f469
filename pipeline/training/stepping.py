"""One optimiser step on the heads: gradients of all micro-batches and processes, clip, AdamW.

No step waits for the device. Whether its numbers are finite is decided there, where a step that is
not changes nothing; here they are read when the next step has been asked for, or earlier by who
wants to know them or is about to save the heads (`settle`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.image_tokens import rescale_image_rows
from pipeline.bridge.mixed_batch import MixedBatch
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws
from pipeline.devices import Arriving
from pipeline.settings import Objective, TrainingSettings
from pipeline.training.accumulation import backpropagate
from pipeline.training.distribution import (
    average_gradients,
    complete_gradients,
    mean_over_processes,
)
from pipeline.training.fusion import fuse_layers
from pipeline.training.recomputation import recompute_activations
from pipeline.training.sharding import is_sharded
from pipeline.training.validation import loss_values


class NonFiniteStepError(Exception):
    """A step, from 0, whose loss or gradient is not finite: its numbers, and what it was given."""

    def __init__(
        self, step: int, values: dict[str, float], batch: CaptionBatch | MixedBatch
    ) -> None:
        super().__init__(f"step {step}: not finite: {values}")
        self.step, self.values, self.batch = step, values, batch


@dataclass(frozen=True)
class _Taken:
    """A step whose numbers were not looked at yet."""

    step: int
    batch: CaptionBatch | MixedBatch
    names: list[str]
    numbers: Arriving
    rate: float

    def values(self) -> dict[str, float]:
        values = dict(zip(self.names, np.asarray(self.numbers).tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteStepError(self.step, values, self.batch)
        return values | {"learning_rate": self.rate}


class Stepper:
    """Optimiser steps on one model: AdamW over every trained tensor, `E_img` at a rate of its own.

    AdamW is torch's fused one: one kernel, which the device itself can tell to do nothing.

    The heads are put into the objective's `trained_dtype`. From now on the language model's layers
    are fused and its activations recomputed, where `settings` say so.

    Raises:
        ValueError: `settings.shard_language_model` is not how the language model was loaded, or
            does not go with the objective.
        BackboneError: this language model's layers cannot be fused, or its activations not be
            recomputed.
    """

    def __init__(
        self, gill: MultimodalLanguageModel, objective: Objective, settings: TrainingSettings
    ) -> None:
        _refuse_unfit_sharding(gill, objective, settings)
        self.gill, self.objective, self.settings = gill, objective, settings
        if settings.fuse_layers:
            fuse_layers(gill.language_model)
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
            fused=True,
        )
        self._taken: _Taken | None = None
        self._values: dict[str, float] = {}
        self._mean_row_norm = gill.language_model.mean_row_norm()

    def settle(self) -> dict[str, float]:
        """Wait for the last step: its loss, parts, gradient norm before clipping, rate.

        Under several processes the same in all.

        Raises NonFiniteStepError for a step that therefore changed nothing.
        """
        if self._taken is not None:
            taken, self._taken = self._taken, None
            self._values = taken.values()
        return self._values

    def take(self, step: int, batch: CaptionBatch | MixedBatch, draws: PackingDraws) -> None:
        """Step number `step`, from 0; `settle` has its numbers.

        Under several processes `batch` and `draws` are this process's part and the step is that of
        the global batch: all change their heads alike.

        Raises NonFiniteStepError for the step before, with the heads as that one found them.
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
        numbers = torch.cat([means, norm.float()[None]])
        # The device has this step to do while the one before is looked at: it does not stand still.
        self.settle()
        # By the step's number alone: there is no scheduler whose state a resumed run would need.
        rate = settings.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        skipped = ~numbers.isfinite().all()
        self._step_unless(skipped)
        if self.objective.rescale_image_rows:
            rescale_image_rows(self.gill.heads.image_embeddings, self._mean_row_norm, skipped)
        names = [*parts, "gradient_norm"]
        self._taken = _Taken(step, batch, names, Arriving(numbers), rate)

    def _step_unless(self, skipped: Tensor) -> None:
        """By what torch's `GradScaler` tells fused optimisers: a number on the device, 1 for no."""
        optimizer: Any = self.optimizer
        optimizer.found_inf = skipped.float()
        optimizer.step()
        del optimizer.found_inf


def _refuse_unfit_sharding(
    gill: MultimodalLanguageModel, objective: Objective, settings: TrainingSettings
) -> None:
    sharded = is_sharded(gill.language_model)
    if sharded != settings.shard_language_model:
        raise InputError(
            f"run.shard_language_model is {settings.shard_language_model}, but the language "
            f"model was loaded {'sharded' if sharded else 'whole'}: see pipeline.training.sharding"
        )
    if sharded and settings.fuse_layers:
        raise InputError(
            "run.fuse_layers compiles whole decoder layers, and those of a sharded language model "
            "are gathered anew at every call: turn one of them off"
        )
    if sharded and objective.separate_image_draws:
        raise InputError(
            "objective.separate_image_draws lets processes run different numbers of passes, but "
            "those of a sharded language model run all passes together: turn one of them off"
        )
