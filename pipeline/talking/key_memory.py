"""Keys and values in memory that is taken ahead, in transformers' interface of a cache.

transformers' growing cache copies the keys and values of all layers for every token. Here a token
is written behind the last one, and what attention reads is a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

BLOCK = 256  # positions by which memory grows


class KeyMemory(DynamicLayer):
    """One layer, [B, H, S, h] twice. The first read takes what it needs and no more."""

    keys: Tensor
    values: Tensor
    _memory: list[Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write behind what is there; returns all that is there, as views."""
        new = key_states, value_states
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            return self._take([_owned(states) for states in new], key_states.shape[2])
        assert self._memory is not None
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        memory = self._memory
        if end > memory[0].shape[2]:
            memory = [_owned(x, end + BLOCK) for x in (self.keys, self.values)]
        for there, states in zip(memory, new, strict=True):
            there[:, :, start:end] = states
        return self._take(memory, end)

    def _take(self, memory: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
        self._memory = memory
        self.keys, self.values = (states[:, :, :length] for states in memory)
        return self.keys, self.values


def _owned(states: Tensor, length: int | None = None) -> Tensor:
    """A copy [B, H, length, h]; what is beyond the states is not set."""
    num_rows, heads, there, width = states.shape
    # What is made in inference mode could not be written to elsewhere.
    with torch.inference_mode(False):
        memory = states.new_empty(num_rows, heads, length or there, width)
        memory[:, :, :there] = states
    return memory


def key_memory() -> Cache:
    """That of a whole model: layers are added as they are read."""
    return Cache(layer_class_to_replicate=KeyMemory)
