"""Attention over sequences of any lengths in padded grids: one, or two where lengths differ.

A grid is as wide as its longest sequence: the r [IMG] tokens of many requests beside some long
answers would mostly be padding. Then the short sequences have a grid of their own.

Legend: S packed tokens of this pass, B sequences, of a grid b; T the longest sequence, of a grid t;
P the longest prefix, of a grid p; H heads, h head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.devices import sent_together

DEVICES = {"cpu"}
"""Where this was measured to be faster: two grids, and float32 in place of half precision."""
_GAIN = 2.0
"""How many times cheaper two grids have to be: they are gathered twice."""


@dataclass(frozen=True)
class Grid:
    """The sequences of one grid, in its order."""

    sequences: Int64[Tensor, " b"]
    starts: Int64[Tensor, " b"]
    """How long each sequence's prefix is."""
    before: int
    """p."""
    longest: int
    """t."""


@dataclass(frozen=True)
class Grids:
    """Two grids, and where a token lies when their places follow each other."""

    slots: Int64[Tensor, " S"]
    parts: tuple[Grid, Grid]

    @classmethod
    def of(
        cls, lengths: Sequence[int], before: Sequence[int], device: torch.device
    ) -> Grids | None:
        """For sequences of these lengths after prefixes of `before`; None where one grid costs
        (queries times keys) less than twice as much."""
        parts = _parted(lengths, before) if device.type in DEVICES else None
        if parts is None:
            return None
        longest = [max(lengths[i] for i in part) for part in parts]
        slots, taken = {}, 0
        for part, t in zip(parts, longest, strict=True):
            for row, i in enumerate(part):
                slots[i] = range(taken + row * t, taken + row * t + lengths[i])
            taken += len(part) * t
        sent = sent_together(
            [
                # In the order in which the tokens are packed.
                [slot for i in range(len(lengths)) for slot in slots[i]],
                *parts,
                *([before[i] for i in part] for part in parts),
            ],
            device,
        )
        first, second = (
            Grid(sent[1 + n], sent[3 + n], max(before[i] for i in parts[n]), longest[n])
            for n in range(2)
        )
        return cls(sent[0], (first, second))

    def attend(
        self,
        query: Float[Tensor, "S H h"],
        key: Float[Tensor, "S Hk h"],
        value: Float[Tensor, "S Hk h"],
        past: tuple[Float[Tensor, "B Hk P h"], Float[Tensor, "B Hk P h"]] | None,
        scale: float | None,
        window: int | None,
    ) -> Float[Tensor, "S H h"]:
        """Causal attention within sequences, after the keys and values of their prefixes.

        A query sees the `window` last keys, itself included; None: all.
        """
        outs = []
        laid_out = zip(*map(self._lay_out, (query, key, value)), strict=True)
        for grid, (q, k, v) in zip(self.parts, laid_out, strict=True):
            if past is not None:
                k, v = (
                    torch.cat([x[:, :, : grid.before].index_select(0, grid.sequences), own], dim=2)
                    for x, own in zip(past, (k, v), strict=True)
                )
            mask = causal_mask(grid.starts, grid.before, grid.longest, window)
            outs.append(attend_in_grid(q, k, v, mask, scale))
        places = torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])
        return places.index_select(0, self.slots)

    def _lay_out(self, rows: Float[Tensor, "S H h"]) -> list[Float[Tensor, "b H t h"]]:
        """Packed states in both grids; places past a sequence's end are zero."""
        sizes = [len(grid.sequences) * grid.longest for grid in self.parts]
        places = rows.new_zeros(sum(sizes), *rows.shape[1:]).index_copy(0, self.slots, rows)
        return [
            # [b * t, H, h] -> [b, H, t, h]
            part.unflatten(0, (-1, grid.longest)).transpose(1, 2)
            for part, grid in zip(places.split(sizes), self.parts, strict=True)
        ]


def attend_in_grid(
    query: Float[Tensor, "b H t h"],
    key: Float[Tensor, "b Hk K h"],
    value: Float[Tensor, "b Hk K h"],
    mask: Bool[Tensor, "b 1 t K"] | None,
    scale: float | None,
) -> Float[Tensor, "b H t h"]:
    """Attention where the mask lets it; None is causal, with as many keys as queries."""
    # Grouped queries: several heads share a key.
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # On a CPU torch's backward pass in half precision takes three times as long as in float32.
    slow = query.device.type in DEVICES and query.dtype in (torch.bfloat16, torch.float16)
    own = torch.float32 if slow else query.dtype
    q, k, v = (x.to(own) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out.to(query.dtype)


def causal_mask(
    starts: Int64[Tensor, " b"], p: int, t: int, window: int | None = None
) -> Bool[Tensor, "b 1 t K"]:
    """Who sees whom after prefixes of lengths `starts`; of these the `window` last ones, itself
    included. Columns are the padded prefix, p of them, then the t own tokens.

    The causal part is not cut at a sequence's end: a query that sees nothing is NaN.
    """
    own = torch.arange(t, device=starts.device)
    past = torch.arange(p, device=starts.device)
    # Positions of queries [b, t] and keys [b, K]; every prefix begins at 0.
    queries = starts[:, None] + own
    keys = torch.cat([past.expand(len(starts), -1), queries], dim=1)
    # [b, p] and [1, t, t] -> [b, t, K]
    seen = torch.cat(
        [
            (past < starts[:, None])[:, None].expand(-1, t, -1),
            (own <= own[:, None]).expand(len(starts), -1, -1),
        ],
        dim=2,
    )
    if window is not None:
        seen = seen & (queries[:, :, None] - keys[:, None, :] < window)
    return seen[:, None]


def _parted(lengths: Sequence[int], before: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """The short and the long sequences, where grids of their own are worth it."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])

    def cost(part: Sequence[int]) -> int:
        longest = max(lengths[i] for i in part)
        return len(part) * longest * (longest + max(before[i] for i in part))

    cuts = [n for n in range(1, len(order)) if lengths[order[n - 1]] < lengths[order[n]]]
    costs = {n: cost(order[:n]) + cost(order[n:]) for n in cuts}
    best = min(costs, key=lambda n: costs[n], default=0)
    if not best or _GAIN * costs[best] > cost(order):
        return None
    return order[:best], order[best:]
