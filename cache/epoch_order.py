"""The order of an epoch: which rows, when, on which rank. Numbers only; reads nothing.

Two levels, so that storage sees neighbouring rows together: the order of blocks (runs of
consecutive rows) is shuffled, then the rows of a window of several blocks are mixed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Window(NamedTuple):
    """Rows that are mixed together.

    pieces: ascending rows of one block each; rows int64 [n]: all of them; permutation int64 [n]:
    the order in which they leave, as offsets into rows.
    """

    pieces: list[NDArray[np.int64]]
    rows: NDArray[np.int64]
    permutation: NDArray[np.int64]


def plan_epoch(
    rows: NDArray[np.int64],
    *,
    block_rows: int,
    buffer_rows: int,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
) -> list[Window]:
    """The windows of one rank in one epoch, of rows int64 [N], ascending.

    Over all ranks, every row is in one window; ranks differ by at most one row. A window has at
    most buffer_rows rows (or one block, if that is more). Depends on the arguments alone.
    """
    # Where a new block begins among `rows`; of a subset a block has what is left of it.
    starts = np.flatnonzero(np.diff(rows // block_rows, prepend=-1))
    blocks = np.split(rows, starts[1:]) if len(starts) else []
    # Each rank takes an equal stretch of the shuffled blocks, cutting one in two where need be.
    low, high = len(rows) * rank // world_size, len(rows) * (rank + 1) // world_size
    windows: list[Window] = []
    pieces: list[NDArray[np.int64]] = []
    begin = held = 0

    def close() -> None:
        # By the window's number: wherever an epoch is entered, no earlier window is needed.
        rng = np.random.default_rng([seed, epoch, rank, len(windows)])
        windows.append(Window(list(pieces), np.concatenate(pieces), rng.permutation(held)))
        pieces.clear()

    # The same on every rank: all walk through all blocks, each keeps what falls into its stretch.
    for number in np.random.default_rng([seed, epoch]).permutation(len(blocks)):
        block = blocks[number]
        piece = block[max(0, low - begin) : max(0, high - begin)]
        begin += len(block)
        if len(piece) == 0:
            continue
        if pieces and held + len(piece) > buffer_rows:
            close()
            held = 0
        pieces.append(piece)
        held += len(piece)
    if pieces:
        close()
    return windows
