"""Fewer kernels in the decoder layers of a frozen language model, for GPUs that wait for memory.

    query, key, value     one product of their input with the three weights, one below the other
    ReLU                  in the product before it: its output is not read and written once more
    norms, residuals      compiled by torch: what stands between two products is one kernel

Attention stays as it is and is called in between. Sums are the same, in another order. Where keys
and values are kept for the backward pass, their queries are too: 0.6 GB of the 28 that a step of
200 captions takes with OPT-6.7B (predicted).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.devices import rounding_error
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.packing import ATTENTION, Packing, packed_attention
from pipeline.training.recomputation import decoder_layers

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Eleven in all, no width of a model: torch's compiler takes sizes that are equal at first for one.
_PROOF_LENGTHS = (7, 4)


def fuse_layers(
    language_model: LanguageModel, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """From now on run the decoder layers fused, once that is proved on a few tokens.

    Every kind of pass compiles at its first call, in some seconds; sequences of other lengths do
    not compile anew. `backend`: torch.compile's.

    Raises:
        BackboneError: the layers cannot be compiled here, or give something else than before. The
            model is of no use from then on.
    """
    language_model.read_start()  # a single token, for which torch would make a variant of its own
    before = _states_and_gradient(language_model)
    # A compiled layer calls it as it is: what it does depends on numbers that no compiler sees.
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, torch.compiler.disable(packed_attention))
    join_products(language_model)
    for layer in decoder_layers(language_model.model):
        layer.compile(backend=backend, dynamic=True)
    try:
        after = _states_and_gradient(language_model)
    except (RuntimeError, IndexError) as error:
        reason = " ".join(str(error).splitlines()[:2])  # behind them torch's hints
        raise BackboneError(
            "run.fuse_layers: this language model's layers cannot be compiled here; set it to "
            f"false ({type(error).__name__}: {reason})"
        ) from error
    for fused, plain in zip(after, before, strict=True):
        apart = float((fused - plain).abs().max() / plain.abs().max())
        # This way round, NaN is refused as well.
        if not apart <= rounding_error(language_model.dtype):
            raise BackboneError(
                f"run.fuse_layers: fused, this language model differs by {apart:.1e}; set it to "
                "false"
            )


def join_products(language_model: LanguageModel) -> None:
    """Query, key and value in one product, and ReLU in the one before it, where a layer has them as
    ordinary linear layers; quantised ones stay as they are."""
    for module in list(language_model.model.modules()):
        parts: list[Any] = [getattr(module, name, None) for name in _PROJECTIONS]
        if all(type(part) is nn.Linear for part in parts) and _fit(parts):
            joined = _Joined(parts)
            for name, part in zip(_PROJECTIONS, (_First, _Next, _Next), strict=True):
                setattr(module, name, part(joined))
        # OPT's names.
        product, activation = getattr(module, "fc1", None), getattr(module, "activation_fn", None)
        if type(product) is nn.Linear and type(activation) is nn.ReLU and product.bias is not None:
            setattr(module, "fc1", _LinearReLU(product))  # noqa: B010
            setattr(module, "activation_fn", nn.Identity())  # noqa: B010


def _fit(parts: list[Any]) -> bool:
    """Whether they have inputs of the same width, and all a bias or none."""
    return len({(part.in_features, part.bias is None) for part in parts}) == 1


class _Joined(nn.Module):
    """Several linear layers of one input, as one product."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        # [out of all, in]
        self.weight = _below_each_other([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        self.bias = _below_each_other(biases) if biases else None
        self.waiting: list[Tensor] = []
        """Outputs that were made and not asked for yet."""

    def forward(self, x: Float[Tensor, "*batch in"]) -> tuple[Tensor, ...]:
        """Each layer's output."""
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)


def _below_each_other(tensors: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat(list(tensors)), requires_grad=False)


class _First(nn.Module):
    """In the place of the layer that is called first: makes the outputs of all."""

    def __init__(self, joined: _Joined) -> None:
        super().__init__()
        self.joined = joined

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Its own output; the others wait."""
        own, *others = self.joined(x)
        self.joined.waiting = list(others)  # which torch 2.11's compiler takes for a tuple
        return own


class _Next(_First):
    """In the place of the next one, which is called on the same input."""

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """What waits for it. Not kept: it lives as long as who asked needs it."""
        return self.joined.waiting.pop(0)


class _LinearReLU(nn.Module):
    def __init__(self, product: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = product.weight, product.bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """max(x W^T + b, 0)."""
        return _ProductReLU.apply(x, self.weight, self.bias)


class _ProductReLU(torch.autograd.Function):
    """max(x W^T + b, 0) with a gradient for x alone; kept for it: the output."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        # torch's own product with an epilogue, which takes matrices: [*batch, in] -> [tokens, in].
        rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=False)
        output = rows.unflatten(0, x.shape[:-1])
        ctx.save_for_backward(output, weight)
        return output

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        output, weight = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, output, 0) @ weight, None, None


def _states_and_gradient(language_model: LanguageModel) -> tuple[Tensor, Tensor]:
    """Hidden states [11, e] of a few tokens, and the gradient [11, e] of a sum of them."""
    device = language_model.device
    ids = torch.arange(sum(_PROOF_LENGTHS), device=device) % language_model.num_rows
    with torch.inference_mode(False), torch.enable_grad():
        inputs = language_model.embed(ids).detach().requires_grad_()
        states = language_model.hidden_states(inputs, Packing.of(_PROOF_LENGTHS, device))
        # Not the sum of their squares, which the final norm keeps.
        weights = torch.arange(states.numel(), device=device).cos().view_as(states)
        (states * weights).sum().backward()
    assert inputs.grad is not None
    return states.detach(), inputs.grad
