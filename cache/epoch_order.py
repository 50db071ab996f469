"""The order of an epoch: which rows, when, in which process. Numbers only; reads nothing.

Two levels, so that storage sees neighbouring rows together: the order of blocks (runs of
consecutive rows) is shuffled, then the rows of a window of several blocks are mixed. There is one
such order for all processes; of every batch each takes an equal stretch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Window(NamedTuple):
    """Rows that are mixed together: those that one process takes.

    pieces: ascending rows of one block each; rows int64 [n]: all of them; permutation int64 [n]:
    the order in which they leave, as offsets into rows.
    """

    pieces: list[NDArray[np.int64]]
    rows: NDArray[np.int64]
    permutation: NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of every batch; batch_size counts the rows of all.

    Of several workers of one process, each takes every num_workers-th batch.
    """

    batch_size: int
    rank: int
    world_size: int
    worker: int = 0
    num_workers: int = 1

    def bounds(self, size: NDArray[np.int64] | int) -> tuple:
        """Of a batch of `size` rows, the first that is taken, and the end."""
        return size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size

    def steps(self, first: int, end: int) -> range:
        """The steps that are taken of those from `first` on."""
        return range(first + (self.worker - first) % self.num_workers, end, self.num_workers)


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of all processes; its windows are made when they are asked for.

    rows int64 [N], ascending; starts int64 [blocks + 1]: where blocks begin in rows; order int64
    [blocks]: blocks as they come; cuts: where windows begin in `order`; begins int64 [windows + 1]:
    where they begin in the epoch.
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    order: NDArray[np.int64]
    cuts: list[int]
    begins: NDArray[np.int64]
    seed: int
    epoch: int

    def windows(self, share: Share, step: int = 0) -> Iterator[Window]:
        """What is left for one process from a step on, window by window."""
        first = min(step * share.batch_size, len(self.rows))
        entered = int(np.searchsorted(self.begins[1:], first, side="right"))
        for number in range(entered, len(self.cuts) - 1):
            window = self._window(number, share, first)
            if len(window.rows):
                yield window

    def _window(self, number: int, share: Share, first: int) -> Window:
        """Those rows of a window that are in the share, and not before position `first`."""
        blocks = self.order[self.cuts[number] : self.cuts[number + 1]]
        pieces = [self.rows[self.starts[b] : self.starts[b + 1]] for b in blocks.tolist()]
        begin, end = self.begins[number : number + 2].tolist()
        # The 0 was a rank once: with it, one process has the order that it always had.
        rng = np.random.default_rng([self.seed, self.epoch, 0, number])
        permutation = rng.permutation(end - begin)
        positions = np.arange(begin, end)
        num_rows, size = len(self.rows), share.batch_size
        in_last = positions >= num_rows // size * size
        low, high = share.bounds(np.where(in_last, num_rows % size, size))
        within = positions % size
        taken = (within >= low) & (within < high) & (positions >= first)
        if share.num_workers > 1:
            taken &= positions // size % share.num_workers == share.worker
        leaving = permutation[taken]
        kept = np.sort(leaving)
        ends = np.searchsorted(kept, np.cumsum([len(piece) for piece in pieces]))
        rows = np.concatenate(pieces)[kept]
        return Window(
            [piece for piece in np.split(rows, ends[:-1]) if len(piece)],
            rows,
            np.searchsorted(kept, leaving),
        )


def plan_epoch(
    rows: NDArray[np.int64], *, block_rows: int, buffer_rows: int, seed: int, epoch: int
) -> EpochPlan:
    """The order of one epoch over rows int64 [N], ascending.

    Every row is in one window; a window has at most buffer_rows rows (or one block, if that is
    more). Depends on the arguments alone.
    """
    starts = np.zeros(1, np.int64)
    if len(rows):
        borders = np.arange(rows[0] // block_rows, rows[-1] // block_rows + 2) * block_rows
        starts = np.unique(np.searchsorted(rows, borders))
    order = np.random.default_rng([seed, epoch]).permutation(len(starts) - 1)
    cuts, begins = [0], [0]
    held = 0
    for i, size in enumerate(np.diff(starts)[order].tolist()):
        if held and held + size > buffer_rows:
            cuts.append(i)
            begins.append(begins[-1] + held)
            held = 0
        held += size
    if held:
        cuts.append(len(order))
        begins.append(begins[-1] + held)
    return EpochPlan(rows, starts, order, cuts, np.array(begins, np.int64), seed, epoch)
