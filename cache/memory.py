"""Memory that is used again: large arrays without their page faults."""

from __future__ import annotations

import math
import weakref

import numpy as np

RECYCLED = 8  # arrays whose memory is kept


class Memory:
    """Arrays [size, *shape], in memory that an earlier one has left if there is any.

    Fresh memory costs a page fault every 4 kB: more than reading into it does.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self._blocks: list[tuple[memoryview, weakref.ref[np.ndarray]]] = []

    def empty(self, size: int) -> np.ndarray:
        """An uninitialised array of `size` rows, in memory given back where there is some."""
        count = size * math.prod(self._shape)
        free = (
            i
            for i, (block, user) in enumerate(self._blocks)
            if user() is None and block.nbytes >= count * self._dtype.itemsize
        )
        if (i := next(free, None)) is not None:
            block, _ = self._blocks.pop(i)
        else:
            block = np.empty(count, self._dtype).data.cast("B")
        # Every view that a user makes has this array as its base: as long as one lives, it does.
        user = np.frombuffer(block, self._dtype, count)
        # Used last, kept longest: what falls off the front is freed when its user lets go.
        self._blocks = [*self._blocks, (block, weakref.ref(user))][-RECYCLED:]
        return user.reshape(size, *self._shape)
