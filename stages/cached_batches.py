"""Training batches from the cache: shuffled rows of both stores with their captions as ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from cache import Batch, ReadingParams, ShuffledRows, read_rows
from corpora.caption_table import CaptionTable
from pipeline.batch import CaptionBatch
from pipeline.language_model import LanguageModel
from stages.failures import StageError
from stages.paths import ARTIFACTS


class CachedBatches:
    """Batches of one split without end, resumable at any step (`pipeline.training.BatchSource`)."""

    def __init__(
        self,
        table: CaptionTable,
        language_model: LanguageModel,
        *,
        split: str,
        batch_size: int,
        max_tokens: int,
        seed: int,
        rank: int,
        world_size: int,
        reading: ReadingParams,
    ) -> None:
        """`batch_size` counts the examples of all processes.

        Raises StageError when the split cannot fill one batch.
        """
        subset = table.rows_of_split(split)
        self._rows = ShuffledRows(
            sources(),
            batch_size=batch_size // world_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            subset=subset,
            drop_last=True,
            params=reading,
        )
        if len(self._rows) == 0:
            raise StageError(
                f"training.batch_size is {batch_size}, but the split {split!r} of {table.path} has "
                f"only {self._rows.num_rows} usable rows: lower it, or add rows"
            )
        self._table, self._language_model, self._max_tokens = table, language_model, max_tokens
        self._state = self._rows.state_dict()

    def __iter__(self) -> Iterator[CaptionBatch]:
        while True:
            for batch in self._rows:
                self._state = self._rows.state_dict()
                yield caption_batch(batch, self._table, self._language_model, self._max_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and step after the batch handed out last."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from an earlier position."""
        self._rows.load_state_dict(state)
        self._state = dict(state)


def sources() -> dict[str, tuple[Any, str]]:
    """The arrays that training reads."""
    return {
        "pooled": (ARTIFACTS.features, "pooled"),
        "embedding": (ARTIFACTS.targets, "embedding"),
    }


def read_batch(
    rows: Iterable[int], table: CaptionTable, language_model: LanguageModel, max_tokens: int
) -> CaptionBatch:
    """Given rows of both stores, in the order asked for."""
    wanted = np.asarray(list(rows), np.int64)
    arrays = {name: read_rows(where, wanted, [a])[a] for name, (where, a) in sources().items()}
    return caption_batch(Batch(wanted, arrays), table, language_model, max_tokens)


def caption_batch(
    batch: Batch, table: CaptionTable, language_model: LanguageModel, max_tokens: int
) -> CaptionBatch:
    """Rows of the cache and their captions as one training batch; vectors become float32."""
    captions = table.captions(batch.rows)
    ids = language_model.tokenizer(captions, add_special_tokens=False)["input_ids"]
    return CaptionBatch.from_lists(
        ids,
        torch.from_numpy(batch.arrays["pooled"]).float(),
        torch.from_numpy(batch.arrays["embedding"]).float(),
        torch.from_numpy(batch.rows),
        max_tokens,
    ).to(language_model.device)
