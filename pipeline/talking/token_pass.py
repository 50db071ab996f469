"""The pass of one token in every row of a context, in memory of one size: a GPU's captured graph.

    beside it    keys and values [B, H, C, h] of every layer, a mask [B, 1, 1, C], the inputs
    each token   inputs, positions and who has one are copied into place, and the graph is played

Decoding asks a GPU for some hundred kernels a token, each with a word from Python that takes longer
than the kernel. Played from a graph they follow one another by themselves. A graph knows its memory
by address: a context's keys and values are copied there for the length of an answer, and the memory
serves the next answer. Elsewhere than on a GPU contexts are read eagerly.

Letters: B rows, C places for keys, H heads, h head width, e language-model width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from pipeline.devices import captured, rounding_error, sent_together
from pipeline.frozen.language_model import LanguageModel

DEVICES = ("cuda",)
BLOCK = 256
"""Places for keys are a multiple of this, so that answers of many lengths share a graph."""
MOST_ROWS = 8
"""Of more rows the kernels are long enough for Python, and their memory is large."""


class _Places(DynamicLayer):
    """A layer's keys and values; a token is written where `at`, on the device, says."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, at: Int64[Tensor, " 1"]) -> None:
        super().__init__()
        self.keys, self.values, self.at = keys, values, at
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values


class TokenPass:
    """One token for B rows over at most C keys.

    Holds nothing of the language model but its layers, so that it is gone with it.

    Raises:
        RuntimeError: the model cannot be captured, or what is played differs from what is computed.
    """

    def __init__(
        self, language_model: LanguageModel, like: Sequence[tuple[Tensor, Tensor]], capacity: int
    ) -> None:
        """`like`: keys and values of every layer [B, H, _, h], for their shapes."""
        rows, device, dtype = len(like[0][0]), language_model.device, language_model.dtype
        self.num_rows, self.capacity = rows, capacity
        self._layers = language_model.model.base_model
        # Kept beyond this call: what is made in inference mode could not be written to elsewhere.
        with torch.inference_mode(False), torch.no_grad():
            at = torch.zeros(1, dtype=torch.int64, device=device)
            self._numbers = torch.zeros(2 * rows + 1, dtype=torch.int64, device=device)
            self._inputs = torch.zeros(rows, 1, language_model.width, dtype=dtype, device=device)
            self._mask = torch.zeros(rows, 1, 1, capacity, dtype=dtype, device=device)
            self._at = at
            # Zeros: a place that no mask shows is still multiplied.
            self._places = [
                _Places(_empty(keys, capacity), _empty(values, capacity), at)
                for keys, values in like
            ]
            self._cache = Cache(layers=list(self._places))
            self._play = captured(self._compute, device)
            self._prove(device)

    def load(self, states: Sequence[tuple[Tensor, Tensor]], seen: Bool[Tensor, "B S"]) -> None:
        """Begin behind these keys and values, of which `seen` (on the CPU) are looked at."""
        length = seen.shape[1]
        for place, (keys, values) in zip(self._places, states, strict=True):
            place.keys[:, :, :length].copy_(keys)
            place.values[:, :, :length].copy_(values)
        [there] = sent_together([seen.flatten().long()], self._mask.device)
        self._mask.fill_(torch.finfo(self._mask.dtype).min)
        self._mask[:, 0, 0, :length].masked_fill_(there.view_as(seen) != 0, 0.0)

    def read(
        self,
        embeddings: Float[Tensor, "B 1 e"],
        positions: Int64[Tensor, "B 1"],
        real: Bool[Tensor, "B 1"],
        at: int,
    ) -> Float[Tensor, "B 1 e"]:
        """The final hidden states of one token a row, written to place `at`; `real` (on the CPU, as
        `positions` are): which rows have one. The next call writes over the result."""
        self._inputs.copy_(embeddings)
        numbers = [positions[:, 0], real[:, 0].long(), torch.tensor([at])]
        self._numbers.copy_(torch.cat(sent_together(numbers, self._numbers.device)))
        return self._play()

    def states(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer up to `length`, which later calls write over."""
        return [(one.keys[:, :, :length], one.values[:, :, :length]) for one in self._places]

    def _compute(self) -> Float[Tensor, "B 1 e"]:
        rows, least = self.num_rows, torch.finfo(self._mask.dtype).min
        positions, real = self._numbers[:rows, None], self._numbers[rows : 2 * rows]
        self._at.copy_(self._numbers[2 * rows :])
        shown = torch.zeros_like(real, dtype=self._mask.dtype).masked_fill(real == 0, least)
        self._mask.index_copy_(3, self._at, shown[:, None, None, None])
        output = self._layers(
            inputs_embeds=self._inputs,
            position_ids=positions,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def _prove(self, device: torch.device) -> None:
        """That playing is computing, on a random token."""
        if device.type == "meta":
            return
        random = torch.Generator().manual_seed(0)
        self._inputs.copy_(torch.randn(self._inputs.shape, generator=random))
        self._numbers.fill_(1)
        expected, got = self._compute().clone(), self._play()
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= rounding_error(expected.dtype):  # this way round, NaN is refused as well
            raise RuntimeError(f"played, a token differs by {error:.1e}")


def _empty(states: Float[Tensor, "B H _ h"], capacity: int) -> Float[Tensor, "B H C h"]:
    return states.new_zeros(*states.shape[:2], capacity, states.shape[3])


_kept: WeakKeyDictionary[LanguageModel, TokenPass] = WeakKeyDictionary()
"""The one that was given back last: memory of one, not of every size that was met."""
_refused: WeakSet[LanguageModel] = WeakSet()


def borrow(
    language_model: LanguageModel, like: Sequence[tuple[Tensor, Tensor]], length: int
) -> TokenPass | None:
    """A pass with room for more than `length` keys; None where contexts are read eagerly.

    It is the caller's until `give_back`; two that decode at once have two.
    """
    rows = len(like[0][0])
    if language_model.device.type not in DEVICES or rows > MOST_ROWS:
        return None
    if language_model in _refused:
        return None
    kept = _kept.pop(language_model, None)
    if kept is not None and kept.num_rows == rows and length < kept.capacity:
        return kept
    del kept  # before its successor takes memory
    try:
        return TokenPass(language_model, like, (length // BLOCK + 1) * BLOCK)
    except RuntimeError as problem:
        _refused.add(language_model)
        warnings.warn(f"tokens are read without a graph: {problem}", stacklevel=2)
        return None


def give_back(language_model: LanguageModel, token_pass: TokenPass) -> None:
    """Let the next answer have it."""
    _kept[language_model] = token_pass
