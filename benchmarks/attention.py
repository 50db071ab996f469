"""Attention over captions of many lengths: shapes seen for the first time, and grids beside none.

    python -m benchmarks.attention [--device cuda] [--quick] [--json FILE]

Every batch of training, and every token of an answer, brings attention a shape that it may not have
had: `first_ms` beside `again_ms`, forward and backward, by torch's implementation.

On a CPU packed tokens are laid out in a grid [B, T] for attention; on a GPU torch's variable-length
attention reads them as they are: `ragged_ms` beside `grid_ms`, at OPT-6.7B's width and the lengths
of the captioning pass. On a CPU toy sizes, and the grid alone.
"""

from __future__ import annotations

from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Bench, Numbers, Unavailable, run
from benchmarks.random_models import LENGTHS
from pipeline.frozen import ragged_attention
from pipeline.frozen.packing import Packing


def measure(bench: Bench) -> None:
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if bench.on_gpu:
        backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION}
        backends |= {"cuDNN": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():
        bench.part(f"{name}, causal", partial(new_shapes, bench, backend, False))
        if name != "flash":  # which takes no mask
            bench.part(f"{name}, masked", partial(new_shapes, bench, backend, True))
    bench.part("packed tokens", partial(layouts, bench))


def new_shapes(bench: Bench, backend: SDPBackend, masked: bool) -> Numbers:
    """The first and the third call at each of many shapes."""
    rows, heads, width = bench.size((8, 2, 8), (8, 2, 8), (200, 32, 128))
    first, again = [], []
    for longest in range(20, 24 if bench.quick or bench.toy else 44):
        q, k, v = (_random(bench, rows - longest % 4, heads, longest, width) for _ in range(3))
        mask = torch.ones(len(q), 1, longest, longest, device=bench.device).tril().bool()
        attend = partial(
            F.scaled_dot_product_attention, attn_mask=mask if masked else None, is_causal=not masked
        )
        with sdpa_kernel(backend):
            taken = [bench.once(lambda: attend(q, k, v).sum().backward()) for _ in range(3)]  # noqa: B023
        first.append(1e3 * taken[0])
        again.append(1e3 * taken[2])
    return {"first_ms": median(first), "slowest_ms": max(first), "again_ms": median(again)}


def layouts(bench: Bench) -> Numbers:
    """The same packed tokens, laid out per sequence or left as they are."""
    rows, heads, width = bench.size((8, 2, 8), (8, 2, 8), (200, 32, 128))
    lengths = [5 + LENGTHS[i % len(LENGTHS)] for i in range(rows)]  # k = 4 and the start id
    packing, longest = Packing.of(lengths, torch.device(bench.device)), max(lengths)
    packed = [_random(bench, 1, heads, sum(lengths), width) for _ in range(3)]

    def grid() -> Tensor:
        q, k, v = (packing.unpack(states) for states in packed)
        return packing.pack(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    padding = 1 - sum(lengths) / (rows * longest)
    grid_s = bench.seconds(lambda: grid().sum().backward(), times=20)
    if packing.ragged is None:
        return {"grid_ms": 1e3 * grid_s, "padding": padding}
    if not ragged_attention.serves(packed[0], packed[1]):
        raise Unavailable("torch's variable-length attention does not serve here")

    def ragged() -> Tensor:
        assert packing.ragged is not None
        q, k, v = (states[0].transpose(0, 1) for states in packed)
        return ragged_attention.attend(q, k, v, packing.ragged, None, None)

    return {
        "grid_ms": 1e3 * grid_s,
        "padding": padding,
        "ragged_ms": 1e3 * bench.seconds(lambda: ragged().sum().backward(), times=20),
        "difference": float((grid()[0] - ragged()).abs().max()),
    }


def _random(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device).to(bench.dtype).requires_grad_()


if __name__ == "__main__":
    run(measure, __doc__)
