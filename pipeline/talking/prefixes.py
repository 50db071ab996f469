"""Contexts that were read, found again by how a prompt begins.

A conversation that is told anew with every request begins as the one before it: what the language
model has read of it need not be read again.

Letters: n positions, e language-model width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.talking.context import Context


class Prefixes:
    """Contexts of one language model, at most `max_bytes` of keys and values.

    The least recently used go first. Safe to use from several threads.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, tuple[Tensor, Context]] = OrderedDict()
        self._bytes = self._number = 0
        self._lock = threading.Lock()

    def keep(self, inputs: Float[Tensor, "n e"], context: Context) -> None:
        """Keep what a context of one row has read of `inputs`; it may be changed afterwards."""
        read = context.beginning(context.num_read)
        inputs = inputs[: read.num_read]
        with self._lock:
            for number, (earlier, _) in list(self._kept.items()):
                if common_length(earlier, inputs) == len(earlier):
                    self._drop(number)
            self._number += 1
            self._kept[self._number] = inputs, read
            self._bytes += read.num_bytes
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._kept)))

    def longest(self, inputs: Float[Tensor, "n e"]) -> Context | None:
        """A context that has read the longest known beginning of `inputs`, if any is known."""
        with self._lock:
            lengths = {
                number: common_length(kept, inputs) for number, (kept, _) in self._kept.items()
            }
            best = max(lengths, key=lengths.__getitem__, default=0)
            if not lengths.get(best):
                return None
            self._kept.move_to_end(best)
            return self._kept[best][1].beginning(lengths[best])

    def _drop(self, number: int) -> None:
        _, context = self._kept.pop(number)
        self._bytes -= context.num_bytes


def common_length(one: Float[Tensor, "n e"], other: Float[Tensor, "m e"]) -> int:
    """How many rows two inputs have in common from the first on."""
    length = min(len(one), len(other))
    same = (one[:length] == other[:length]).all(dim=1)
    return length if bool(same.all()) else int(torch.argmin(same.int()))
