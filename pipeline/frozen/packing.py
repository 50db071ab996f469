"""Ragged batches without padding: the tokens of many sequences in one row, attention within each.

Hidden states stay packed as [1, S, e] through every layer of the language model, whatever its
architecture. Only inside attention are queries, keys and values laid out per sequence, in a padded
grid, or on a GPU one after the other (`pipeline.frozen.ragged_attention`). The attention function
is registered with transformers under `ATTENTION`; a call that carries a `packing` keyword is
packed, any other is transformers' own scaled-dot-product attention.

Legend: S packed tokens of this pass, B sequences, T longest sequence of this pass, P longest
prefix, H heads, h head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gill_errors import InputError
from pipeline.devices import sent_together
from pipeline.frozen import ragged_attention
from pipeline.frozen.grid_attention import Grids, attend_in_grid, causal_mask
from pipeline.frozen.ragged_attention import RaggedKeys

ATTENTION = "gill_packed"


@dataclass(frozen=True)
class Prefix:
    """Keys and values of sequences already read, positions applied, one pair per layer."""

    lengths: list[int]
    keys: dict[int, Float[Tensor, "B H P h"]]
    values: dict[int, Float[Tensor, "B H P h"]]

    def repeat(self, count: int) -> "Prefix":
        """One sequence as the prefix of `count`."""

        def expanded(states: dict[int, Tensor]) -> dict[int, Tensor]:
            # Views: `count` sequences share one copy.
            return {layer: x.expand(count, -1, -1, -1) for layer, x in states.items()}

        return Prefix(self.lengths * count, expanded(self.keys), expanded(self.values))

    def take(self, rows: Sequence[int], otherwise: "Prefix | None" = None) -> "Prefix":
        """The sequences `rows`, in this order; -1 stands for the one of `otherwise`, or for none.

        One that is taken often is kept as often.
        """
        if list(rows) == list(range(len(self.lengths))):
            return self
        every = [*self.lengths, otherwise.lengths[0] if otherwise else 0]
        lengths = [every[row] for row in rows]
        device = next(iter(self.keys.values())).device
        [index] = sent_together([[row % len(every) for row in rows]], device)

        def taken(states: dict[int, Tensor], others: dict[int, Tensor]) -> dict[int, Tensor]:
            result = {}
            for layer, x in states.items():
                # [1, H, P, h]: zero where no mask lets a token look.
                last = torch.zeros_like(x[:1])
                if others:
                    last[:, :, : every[-1]] = others[layer]
                result[layer] = torch.cat([x, last])[:, :, : max(lengths)].index_select(0, index)
            return result

        none: dict[int, Tensor] = {}
        return Prefix(
            lengths,
            taken(self.keys, otherwise.keys if otherwise else none),
            taken(self.values, otherwise.values if otherwise else none),
        )


# Not frozen, as torch's compiler looks into frozen ones: fused layers (pipeline.training.fusion)
# would have a variant for every kind of contents.
@dataclass(eq=False)
class Packing:
    """How S packed tokens fall into B sequences, and what each sequence follows."""

    lengths: list[int]
    positions: Int64[Tensor, " S"]
    """Position of each token in its sequence, the prefix included."""
    slots: Int64[Tensor, " S"] | None
    """Place of each token in the [B * T] grid; None when all sequences are equally long."""
    starts: Int64[Tensor, " B"]
    """How long each sequence's prefix is."""
    ragged: RaggedKeys | None
    """On a GPU, where attention may do without a grid."""
    prefix: Prefix | None
    recorded: Prefix | None
    """Filled during the pass when keys and values, the prefix's too, are wanted afterwards."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        prefix: Prefix | None = None,
        record: bool = False,
        sent: Sequence[Int64[Tensor, " _"]] | None = None,
    ) -> "Packing":
        """The packing of sequences of these lengths (at least 1), each following its prefix.

        Args:
            sent: `lists`, where they are on the device already.

        Raises:
            ValueError: keys and values are to be recorded after prefixes of different lengths.
        """
        lengths = list(lengths)
        before = [0] * len(lengths) if prefix is None else prefix.lengths
        # The padding of a short prefix would lie between it and its own tokens, where one length
        # per sequence cannot hide it.
        if record and min(before) < max(before):
            raise InputError(f"cannot record after prefixes of different lengths: {before}")
        if sent is None:
            sent = sent_together(cls.lists(lengths, before, device), device)
        positions, slots, starts, *ragged = sent
        return cls(
            lengths=lengths,
            positions=positions,
            slots=slots if min(lengths) < max(lengths) else None,
            starts=starts,
            ragged=RaggedKeys.of(ragged, lengths, before) if ragged else None,
            prefix=prefix,
            recorded=Prefix([a + b for a, b in zip(before, lengths, strict=True)], {}, {})
            if record
            else None,
        )

    @staticmethod
    def lists(
        lengths: Sequence[int], before: Sequence[int], device: torch.device
    ) -> list[Int64[Tensor, " _"]]:
        """What `of` needs on the device of sequences of these lengths after prefixes of `before`,
        still on the CPU: to be sent with others in one copy. All that is larger is made there."""
        longest = max(lengths)
        counts, starts = torch.tensor(lengths), torch.tensor(before)
        # [B, T]: as many places in each row as the longest sequence has; `inside`: with a token.
        grid = torch.arange(longest).expand(len(lengths), longest)
        inside = grid < counts[:, None]
        parts = [(grid + starts[:, None])[inside], inside.flatten().nonzero()[:, 0], starts]
        if device.type in ragged_attention.DEVICES:
            parts += RaggedKeys.lists(lengths, before)
        return parts

    @cached_property
    def mask(self) -> Bool[Tensor, "B 1 T K"] | None:
        """Who sees whom in the grid, K = P + T; None means causal with no prefix."""
        # Without a prefix plain causality is enough: padding is at the end, where no token looks.
        return None if self.prefix is None else self.mask_within(None)

    @cached_property
    def grids(self) -> Grids | None:
        """A grid for the short sequences and one for the long, where that halves the cost."""
        before = self.prefix.lengths if self.prefix else [0] * len(self.lengths)
        return Grids.of(self.lengths, before, self.positions.device)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, its prefix included."""
        before = self.prefix.lengths if self.prefix else [0] * len(self.lengths)
        return max(a + b for a, b in zip(self.lengths, before, strict=True))

    def mask_within(self, window: int | None) -> Bool[Tensor, "B 1 T K"]:
        """Who sees whom where a token sees only the `window` last ones, itself included."""
        before = max(self.prefix.lengths) if self.prefix else 0
        return causal_mask(self.starts, before, max(self.lengths), window)

    def unpack(self, states: Float[Tensor, "1 H S h"]) -> Float[Tensor, "B H T h"]:
        """Lay packed states out per sequence; places past a sequence's end are zero."""
        num_sequences, longest = len(self.lengths), max(self.lengths)
        # [1, H, S, h] -> [S, H, h] -> [B * T, H, h] -> [B, H, T, h].
        rows = states.squeeze(0).transpose(0, 1)
        if self.slots is not None:
            grid = rows.new_zeros(num_sequences * longest, *rows.shape[1:])
            rows = grid.index_copy_(0, self.slots, rows)
        return rows.unflatten(0, (num_sequences, longest)).transpose(1, 2)

    def in_order(
        self,
        key: Float[Tensor, "1 H S h"],
        value: Float[Tensor, "1 H S h"],
        layer: int,
    ) -> tuple[Float[Tensor, "K H h"], Float[Tensor, "K H h"]]:
        """Keys and values of each sequence, its prefix's first, one after the other."""
        # [1, H, S, h] -> [S, H, h]
        own = [states.squeeze(0).transpose(0, 1) for states in (key, value)]
        if self.prefix is None:
            return own[0], own[1]
        # [B, H, P, h] -> [B * P, H, h], and the own tokens behind them.
        past = (self.prefix.keys[layer], self.prefix.values[layer])
        assert self.ragged is not None
        places = self.ragged.places
        keys, values = (
            torch.cat([grid.transpose(1, 2).flatten(0, 1), states]).index_select(0, places)
            for grid, states in zip(past, own, strict=True)
        )
        return keys, values

    def pack(self, states: Float[Tensor, "B H T h"]) -> Float[Tensor, "1 S H h"]:
        """The inverse of `unpack`, in the order of axes that transformers expects back."""
        # [B, H, T, h] -> [B * T, H, h] -> [S, H, h]: what padding computed is dropped here.
        rows = states.transpose(1, 2).flatten(0, 1)
        return (rows if self.slots is None else rows.index_select(0, self.slots))[None]


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "..."],
    key: Float[Tensor, "..."],
    value: Float[Tensor, "..."],
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' calling convention; packed when given a `packing`.

    Layers with a sliding window (Mistral's) see the last `sliding_window` tokens of a sequence.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window = kwargs.get("sliding_window")
    if window is not None and packing.longest <= window:
        window = None
    layer: Any = module.layer_idx
    ragged = packing.ragged
    if ragged is not None and not ragged_attention.serves(query, key):
        ragged = None
    grids = packing.grids if ragged is None else None
    past = None
    if packing.prefix is not None:
        past = (packing.prefix.keys[layer], packing.prefix.values[layer])
    one_grid = ragged is None and grids is None
    if one_grid or packing.recorded is not None:
        k, v = packing.unpack(key), packing.unpack(value)
        # Rotary positions were applied before: the prefix's keys are joined as they are.
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        # With their padding, which `starts` will hide from the pass that follows.
        if packing.recorded is not None:
            packing.recorded.keys[layer], packing.recorded.values[layer] = k, v
    # [1, H, S, h] -> [S, H, h]
    rows, own_keys, own_values = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if ragged is not None:
        keys, values = packing.in_order(key, value, layer)
        return ragged_attention.attend(rows, keys, values, ragged, scaling, window)[None], None
    if grids is not None:
        out = grids.attend(rows, own_keys, own_values, past, scaling, window)
        return out[None], None
    mask = packing.mask if window is None else packing.mask_within(window)
    return packing.pack(attend_in_grid(packing.unpack(query), k, v, mask, scaling)), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
# Calls without a packing (decoding with a cache) get the mask that sdpa would get.
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
