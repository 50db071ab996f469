"""torch's variable-length attention as its documentation has it, plainly: its own needs a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from pipeline.frozen import ragged_attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Sequences one after the other; query i of t sees key j of total where both limits allow it,
    counted from i + total - t."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    for bounds, rows, longest in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
        assert int(bounds.diff().max()) == longest
        assert int(bounds[-1]) == len(rows)
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    out = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].repeat_interleave(groups, 1) for x in (key, value))
        logits = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        own = torch.arange(len(q))[:, None] + len(k) - len(q)
        others = torch.arange(len(k))
        left, right = window_size
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if left >= 0:
            seen &= others >= own - left
        if right >= 0:
            seen &= others <= own + right
        out.append(
            torch.einsum("hqk,khd->qhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)
        )
    return torch.cat(out)


@contextmanager
def on_cpu(kernel: object = attention) -> Iterator[None]:
    """Let attention on the CPU, in any precision, go without a grid."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    ragged_attention._proven.cache_clear()
    with (
        patch.object(ragged_attention, "DEVICES", ("cpu",)),
        patch.object(ragged_attention, "DTYPES", dtypes),
        patch.object(ragged_attention, "_kernel", lambda: kernel),
    ):
        yield
    ragged_attention._proven.cache_clear()
