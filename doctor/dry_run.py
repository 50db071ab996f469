"""Bytes and operations of real code on tensors without contents (torch's meta device).

Every operation that a call makes is seen as it is dispatched. A tensor's bytes are counted from the
moment its storage appears until nothing holds it any more, by Python, by autograd for the backward
pass, or by anything else: so what a formula per architecture would have to list (what each layer
keeps, what recomputation frees, how long a block of logits lives) is what really happens, for any
model, in the time it takes to dispatch the operations.

Four things differ between the meta device and a real one, and are put right here: fused attention
(meta would form the [queries, keys] scores; the kernels do not), autocast (meta has none), the
size of a block of logits, and the grids of attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.bridge.losses import BLOCK_ELEMENTS
from pipeline.frozen import grid_attention

_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten._convolution)


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages that appear on a device while it is active.

    Attributes:
        live: bytes now.
        peak: most bytes so far.
        flop: operations of matrix products and convolutions; a product and a sum are two.
    """

    def __init__(self, device_type: str = "meta", copies_convolutions: bool = False) -> None:
        """`copies_convolutions`: a convolution takes as much room again as its result, which was
        measured with oneDNN on a CPU: it computes in a layout of its own."""
        super().__init__()
        self._copies_convolutions = copies_convolutions
        self.live = self.peak = self.flop = 0
        self._device_type = device_type
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for tensor in _tensors(args):
            self._enter(tensor, counted=False)  # where it is new, it was there before
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=result)
        for tensor in _tensors(result):
            self._enter(tensor, counted=True)
            if self._copies_convolutions and func._overloadpacket in _CONVOLUTIONS:
                self.peak = max(self.peak, self.live + tensor.nbytes)
        return result

    def _enter(self, tensor: Tensor, counted: bool) -> None:
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = size = storage.nbytes() if counted else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class DryRun:
    """Runs calls on meta tensors and keeps count.

    Attributes:
        ledger: bytes and operations so far.
    """

    def __init__(self, device_type: str) -> None:
        """`device_type` is that of the machine that is thought of: `cpu` or `cuda`."""
        self.device_type = device_type
        self.ledger = Ledger(copies_convolutions=device_type == "cpu")

    def __call__(self, call: Callable[[], Any]) -> Any:
        """The call's result; raises what the call raises."""
        fused = _replaced(F, "scaled_dot_product_attention", self._attention)
        BLOCK_ELEMENTS["meta"] = BLOCK_ELEMENTS[self.device_type]
        if self.device_type in grid_attention.DEVICES:
            grid_attention.DEVICES.add("meta")
        try:
            with fused, self.ledger:
                return call()
        finally:
            del BLOCK_ELEMENTS["meta"]
            grid_attention.DEVICES.discard("meta")

    @contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """What autocast to `dtype` does to the operations that the heads use.

        Products take copies in `dtype`; on a GPU layer norm takes float32.
        """
        linear, einsum, layer_norm = F.linear, torch.einsum, F.layer_norm

        def low_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

        def low_einsum(equation: str, *operands: Tensor) -> Tensor:
            return einsum(equation, *(operand.to(dtype) for operand in operands))

        def wide_layer_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return layer_norm(x.float() if self.device_type == "cuda" else x, *args, **kwargs)

        with (
            _replaced(F, "linear", low_linear),
            _replaced(torch, "einsum", low_einsum),
            _replaced(F, "layer_norm", wide_layer_norm),
        ):
            yield

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        enable_gqa: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        # Kernels add a mask of numbers; a boolean one is turned into that.
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        return _FusedAttention.apply(query, key, value, attn_mask, self)


class _FusedAttention(torch.autograd.Function):
    """Shapes, bytes and operations of a fused attention kernel: no scores are kept.

    Forward: two products of 2 * T * K * h each. Backward: five, as the scores are formed again.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, run: DryRun
    ) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, log_sums)
        ctx.run, ctx.product = run, 2 * query.numel() * key.shape[-2]
        run.ledger.flop += 2 * ctx.product
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.run.ledger.flop += 5 * ctx.product
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


@contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A module's function exchanged for the time being."""
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)
