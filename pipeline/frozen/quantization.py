"""Frozen weights in 8 or 4 bits, so that a large language model fits a small card.

Every linear layer but the output head (which is the embedding table of many models, and whose rows
GILL reads) keeps its weight as integers, and multiplies with what they stand for in the model's own
dtype. Inputs are never quantised. So each token's result depends on that token alone, whatever else
is in the batch, and a gradient flows through to the inputs; only integers are kept for it.

| kind | a weight is | bytes | needs |
|---|---|---|---|
| int8 | integer in [-127, 127] times the largest of its row / 127 | 1 | nothing |
| nf4 | one of 16 normal quantiles times the largest of its 64 | 0.52 | extra `quantized` |

LLM.int8() of bitsandbytes picks its outlier columns by all tokens of a batch, so that what a token
gives depends on its neighbours, and torchao's int8 layers keep a dequantised copy of every weight
for the backward pass, which takes the memory back: hence our own layer for int8.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from pipeline.frozen.backbones import BackboneError

_LARGEST = 127


class Int8Linear(nn.Module):
    """A frozen linear layer with one int8 per weight and one scale per output (symmetric)."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> None:
        super().__init__()
        # [out], one scale per output row; a row of zeros must not divide by zero.
        largest = weight.abs().amax(dim=1).float().clamp(min=torch.finfo(torch.float32).tiny)
        steps = weight.float() / (largest / _LARGEST)[:, None]
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.register_buffer("weight", steps.round().to(torch.int8))
        self.register_buffer("scale", largest / _LARGEST)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x W^T + b."""
        product = _Int8Product.apply(x, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


class _Int8Product(torch.autograd.Function):
    """x W^T for W = weight * scale; for the backward pass only integers are kept.

    The integers are exact in every dtype: one copy of the weight is written and read, and what is
    small is scaled, the outputs.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Int8[Tensor, "out in"], scale: Float32[Tensor, " out"]
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        shrunk = x if (room := _room(x.dtype)) == 1 else x / room
        return F.linear(shrunk, weight.to(x.dtype)) * (scale * room).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        # dL/dx = (dL/dy * scale) W, that is [*, out] @ [out, in]; the scale is per output.
        room = _room(gradient.dtype)
        product = (gradient * (scale * room).to(gradient.dtype)) @ weight.to(gradient.dtype)
        return product if room == 1 else product / room, None, None


def _room(dtype: torch.dtype) -> int:
    """By what float16 is divided, and multiplied, so that sums of integers stay in its range and
    gradients do not vanish. A power of two."""
    return 128 if dtype == torch.float16 else 1


class NF4Linear(nn.Module):
    """A frozen linear layer with 4 bits per weight, by bitsandbytes (double quantisation)."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> None:
        super().__init__()
        from bitsandbytes.functional import quantize_4bit

        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        packed, self.state = quantize_4bit(
            weight.contiguous(), quant_type="nf4", compress_statistics=True
        )
        self.weight: Tensor
        self.register_buffer("weight", packed)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x W^T + b."""
        from bitsandbytes import matmul_4bit  # here: few need it, and importing it takes seconds

        # Not `Linear4bit`: on some CPUs it repacks its weight at the first call without gradient,
        # and from then on gives none.
        product = matmul_4bit(x, self.weight, quant_state=self.state)
        return product if self.bias is None else product + self.bias


_LAYERS: dict[str, type[Int8Linear] | type[NF4Linear]] = {"int8": Int8Linear, "nf4": NF4Linear}


def require_quantization(kind: Literal["int8", "nf4"]) -> None:
    """Raises BackboneError naming the extra where `kind` needs one that is not installed."""
    if kind == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise BackboneError(
                "backbones.language_model_quantization: nf4 needs bitsandbytes: "
                f"pip install '.[quantized]', or take int8, which needs nothing ({error})"
            ) from None


def quantize(model: Any, kind: Literal["int8", "nf4"], device: torch.device | str) -> None:
    """Replace the linear layers of a causal language model in place, each moved to `device`.

    Layer by layer, so that the device never holds more than the quantised weights and one layer.
    The rest of the model stays where it is.

    Raises BackboneError when an extra is missing or the model has no linear layer to replace.
    """
    require_quantization(kind)
    head = model.get_output_embeddings()
    # Listed before any is replaced: the walk would meet the new layers.
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    ]
    if not found:
        raise BackboneError(
            f"{type(model).__name__} cannot be quantised: it keeps no weights in linear layers"
        )
    for parent, name, layer in found:
        weight = layer.weight.detach().to(device)
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        # GPT-2 keeps its weights the other way round.
        weight = weight.T if isinstance(layer, Conv1D) else weight
        setattr(parent, name, _LAYERS[kind](weight, bias))
        # `found` still holds the layer: without this all old weights would stay until the end.
        del layer.weight, layer.bias


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, a tensor that is used twice counted once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    # NF4's own scales are in its state, not in buffers; doubly quantised, the scales have scales.
    states = [m.state for m in model.modules() if isinstance(m, NF4Linear)]
    inner = [s.absmax for s in states] + [s.state2.absmax for s in states if s.state2 is not None]
    return sum(t.numel() * t.element_size() for t in [*tensors.values(), *inner])
