"""Shuffled batches for PyTorch's loaders: the only module of this room that knows a tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cache.shuffled_rows import ShuffledRows
from cache.store import EmbeddingStore, open_store


class TorchRows(IterableDataset[dict[str, Tensor]]):
    """The batches of `ShuffledRows`, in its order, for a loader with any number of workers.

    loader = StatefulDataLoader(TorchRows(sources, batch_size=200, seed=0),
                                batch_size=None, num_workers=4)

    Arguments and errors are those of ShuffledRows, rank and world_size included. A batch is
    {"row": int64 [B], **arrays [B, *shape]}: the loader must not batch again (batch_size=None).
    Of w workers each makes every w-th batch, so that a loader, which asks them in turn, hands out
    the order of one process.

    Every pass is the epoch that `set_epoch` names (as of a DistributedSampler; 0 at first), from
    its start. `state_dict` says which batch follows and `load_state_dict` has the next pass begin
    there: the protocol of torchdata's StatefulDataLoader, which wants the number of workers with
    which its state was saved.
    """

    def __init__(
        self, sources: Mapping[str, tuple[str | Path | EmbeddingStore, str]], **options: Any
    ) -> None:
        # By place, not open: a worker opens files and starts threads of its own.
        self._sources = {
            output: (open_store(where).location, name) for output, (where, name) in sources.items()
        }
        self._options = options
        # Shared, as workers that persist are told of a new epoch by it alone.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._begin: dict[str, int] | None = None
        self._reader: tuple[tuple[int, int, int], ShuffledRows] | None = None
        self._rows()  # what is wrong with the stores shows here, not in a worker

    def __len__(self) -> int:
        """Batches of an epoch, over all workers of one rank."""
        return len(self._rows())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order, for this process and its workers."""
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, int]:
        """The position from which `load_state_dict` goes on."""
        return self._begin or self._rows().state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Raises InputError where the state is of other batches."""
        self._begin = self._rows().load_state_dict(state).state_dict()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = self._rows()
        start = {"epoch": int(self._epoch), "step": 0, "batch_size": rows.batch_size}
        rows.load_state_dict(self._begin or start)
        self._begin = None
        return _as_tensors(rows)

    def _rows(self) -> ShuffledRows:
        """The reader of this worker, or of this process where it is none."""
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        place = (os.getpid(), number, num_workers)
        # A fork has its parent's reader, whose threads it lacks.
        if self._reader is None or self._reader[0] != place:
            rows = ShuffledRows(
                self._sources, worker=number, num_workers=num_workers, **self._options
            )
            self._reader = place, rows
        return self._reader[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}  # threads cannot travel


def _as_tensors(rows: ShuffledRows) -> Iterator[dict[str, Tensor]]:
    for batch in rows:
        arrays = {name: torch.from_numpy(values) for name, values in batch.arrays.items()}
        yield {"row": torch.from_numpy(batch.rows), **arrays}
