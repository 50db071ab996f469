"""Activation recomputation for a frozen language model that stays in `eval()`.

transformers' own gradient checkpointing does nothing outside `train()`, and `train()` would bring
dropout back. Here a decoder layer whose output needs a gradient keeps its input alone, and computes
the rest a second time when its gradient is asked for. What is read without gradient (the captions
in front of the [IMG] tokens) is computed once, as before.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.language_model import LanguageModel


def recompute_activations(language_model: LanguageModel) -> None:
    """From now on keep one hidden state per layer between forward and backward.

    Losses and gradients stay the same, bit by bit.

    Raises:
        BackboneError: the model has no decoder layers of transformers' common kind.
    """
    for layer in decoder_layers(language_model.model):
        # On the instance, below `__call__`: hooks of other kinds stay outside and run once.
        setattr(layer, "forward", MethodType(_forward, layer))  # noqa: B010


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model, in order. Raises BackboneError where none is found."""
    layers: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    if not layers:
        raise BackboneError(
            f"{type(model).__name__} has no layers derived from transformers' "
            "GradientCheckpointingLayer: they can be neither recomputed nor sharded"
        )
    return layers


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(layer).forward
    if not torch.is_grad_enabled():
        return forward(layer, *args, **kwargs)
    # A frozen model in eval() draws no random numbers: there is no state to keep.
    return checkpoint(
        forward, layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )
