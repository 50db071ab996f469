"""Attention over sequences of any lengths with no grid: torch's variable-length flash attention.

In the paper's run half of the places of a padded grid hold no token. On a GPU and in half precision
keys and values of a pass lie one after the other, and each query sees its own sequence up to
itself (causal, aligned at the end: a query of the last t sees all that came before). Elsewhere, and
where the kernel does not prove itself, `pipeline.frozen.packing` lays out a grid.

Legend: B sequences, S packed queries, K packed keys, H heads, h head width, P longest prefix.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64
from torch import Tensor

DEVICES, DTYPES = ("cuda",), (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RaggedKeys:
    """Which keys each sequence has, and where they lie before they are put in order."""

    places: Int64[Tensor, " K"]
    """Of each key, sequence by sequence, in the B * P places of the prefixes' grid followed by the
    S own tokens."""
    query_bounds: Int32[Tensor, " bounds"]
    key_bounds: Int32[Tensor, " bounds"]
    longest: tuple[int, int]
    """Queries and keys of the longest sequence."""

    @classmethod
    def lists(cls, lengths: Sequence[int], before: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """`places`, `query_bounds` and `key_bounds` on the CPU, to be sent with others."""
        own, past = torch.tensor(lengths), torch.tensor(before)
        P, T = int(past.max()), int(own.max())
        first = F.pad(own.cumsum(0), (1, 0))  # of a sequence's own tokens; the last is S
        # [B, P] and [B, T], put side by side: row by row the keys of one sequence.
        columns, rows = torch.arange(max(P, T)), torch.arange(len(own))[:, None]
        prefix, tokens = columns[:P], columns[:T]
        places = torch.cat([rows * P + prefix, len(own) * P + first[:-1, None] + tokens], dim=1)
        there = torch.cat([prefix < past[:, None], tokens < own[:, None]], dim=1)
        return places[there], first, F.pad((own + past).cumsum(0), (1, 0))

    @classmethod
    def of(
        cls,
        lists: Sequence[Int64[Tensor, " _"]],
        lengths: Sequence[int],
        before: Sequence[int],
    ) -> RaggedKeys:
        """From `lists`, on the device."""
        places, queries, keys = lists
        longest = max(map(sum, zip(lengths, before, strict=True)))
        # The kernel counts in 32 bits.
        bounds = (queries.to(torch.int32), keys.to(torch.int32))
        return cls(places, *bounds, (max(lengths), longest))


def attend(
    query: Float[Tensor, "S H h"],
    key: Float[Tensor, "K Hk h"],
    value: Float[Tensor, "K Hk h"],
    keys: RaggedKeys,
    scale: float | None,
    window: int | None,
) -> Float[Tensor, "S H h"]:
    """Causal attention within sequences; a query sees the `window` last keys, itself included."""
    return _kernel()(
        query,
        key,
        value,
        keys.query_bounds,
        keys.key_bounds,
        *keys.longest,
        scale=scale,
        # Keys to the left of the query's own, and to its right.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def serves(query: Float[Tensor, "1 H S h"], key: Float[Tensor, "1 Hk S h"]) -> bool:
    """Whether attention of such queries [1, H, S, h] and keys can do without a grid."""
    if query.device.type not in DEVICES or query.dtype not in DTYPES:
        return False
    return _proven(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3])


@lru_cache
def _proven(device: torch.device, dtype: torch.dtype, H: int, Hk: int, h: int) -> bool:
    """Whether the kernel is there and gives what plain attention gives, on two short sequences."""
    lengths, before = [3, 1], [1, 2]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [torch.randn(n, heads, h) for n, heads in ((4, H), (7, Hk), (7, Hk))]
        q, k, v = (x.to(device, dtype) for x in drawn)
        try:
            lists = [x.to(device) for x in RaggedKeys.lists(lengths, before)]
            out = attend(q, k, v, RaggedKeys.of(lists, lengths, before), None, None)
            error = float((out - _plain(q, k, v, lengths, before)).abs().max())
        except (ImportError, AttributeError, TypeError, RuntimeError, ValueError) as problem:
            warnings.warn(f"attention is padded: {problem}", stacklevel=2)
            return False
    # This way round, NaN is refused as well.
    if not error <= 5e-2:
        warnings.warn(
            f"attention is padded: without, it differs by {error:.1e} on {device}", stacklevel=2
        )
        return False
    return True


def _plain(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], before: Sequence[int]
) -> Tensor:
    """The same, sequence by sequence."""
    outs, groups = [], q.shape[1] // k.shape[1]
    totals = [t + p for t, p in zip(lengths, before, strict=True)]
    ends = zip(accumulate(lengths), accumulate(totals), lengths, totals, strict=True)
    for query_end, key_end, t, total in ends:
        # [t, H, h] -> [H, t, h]
        own = q[query_end - t : query_end].transpose(0, 1)
        keys, values = (
            x[key_end - total : key_end].transpose(0, 1).repeat_interleave(groups, dim=0)
            for x in (k, v)
        )
        mask = torch.ones(t, total, dtype=torch.bool, device=q.device).tril(total - t)
        outs.append(F.scaled_dot_product_attention(own, keys, values, attn_mask=mask))
    return torch.cat([out.transpose(0, 1) for out in outs])


def _kernel() -> Any:
    """torch's own. Raises ImportError where it is not there; older ones take other arguments."""
    return import_module("torch.nn.attention.varlen").varlen_attn
