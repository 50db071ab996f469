"""Training batches from the cache: shuffled rows of both stores with their captions as ids.

With `targets.source: online` the captions are encoded here instead of being read: for one short run
that costs less than a store of all targets.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache import ReadingParams, ShuffledRows, open_store, read_rows, usable_rows
from corpora.caption_table import CaptionTable
from gill.artifacts import ARTIFACTS, Artifacts
from gill_errors import StageError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.documents import Document, DocumentBatch
from pipeline.devices import sent
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.language_model import LanguageModel
from stages.made_ahead import MadeAhead

EncodeCaptions = Callable[[Sequence[str]], Conditioning]


class BatchMaker:
    """Rows of the cache and their captions as one training batch, on the language model's device.

    Vectors travel as they are stored and become float32 there.
    """

    def __init__(
        self,
        table: CaptionTable,
        language_model: LanguageModel,
        max_tokens: int,
        encode_captions: EncodeCaptions | None = None,
        artifacts: Artifacts = ARTIFACTS,
        *,
        with_latents: bool = False,
    ) -> None:
        """`encode_captions` gives the targets online; without it they come from the cache."""
        self._table, self._language_model, self._max_tokens = table, language_model, max_tokens
        self._encode_captions, self._artifacts = encode_captions, artifacts
        self._with_latents = with_latents

    @property
    def sources(self) -> dict[str, tuple[Any, str]]:
        """What is read from which store: name -> (store, array)."""
        sources: dict[str, tuple[Any, str]] = {"visual": (self._artifacts.features, "pooled")}
        if self._encode_captions is None:
            for name in open_store(self._artifacts.targets).spec.arrays:
                sources[name] = (self._artifacts.targets, name)
        if self._with_latents:
            sources["posterior"] = (self._artifacts.latents, "posterior")
        return sources

    def usable(self, rows: Iterable[int]) -> np.ndarray:
        """Those of `rows`, in order, that no store failed to encode: int64."""
        stores = {str(where): open_store(where) for where, _ in self.sources.values()}
        return usable_rows(list(stores.values()), rows)[0]

    def read(self, rows: Iterable[int]) -> CaptionBatch:
        """Given rows, in the order asked for."""
        wanted = np.asarray(list(rows), np.int64)
        return self.make(wanted, self._read(wanted))

    def make(self, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> CaptionBatch:
        """A batch from what was read of `sources`."""
        captions, device = self._table.captions(rows), self._language_model.device
        tensors = self._vectors(captions, arrays)
        # Start ids are the model's business, and the same for every caption: they are read once.
        ids = self._language_model.tokenizer(captions, add_special_tokens=False)["input_ids"]
        return CaptionBatch.from_lists(
            ids,
            tensors["visual"],
            tensors["embedding"],
            torch.from_numpy(rows),
            self._max_tokens,
            tensors.get("pooled"),
            tensors.get("posterior"),
        ).to(device)

    def documents(self, documents: Sequence[Document], rows: np.ndarray) -> DocumentBatch:
        """A batch of documents whose picture i is row `rows[i]`."""
        tensors = self._vectors(self._table.captions(rows), self._read(rows))
        return DocumentBatch(
            tuple(documents),
            tensors["visual"],
            tensors["embedding"],
            torch.from_numpy(rows),
            tensors.get("pooled"),
        ).to(self._language_model.device)

    def _read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        sources = self.sources.items()
        return {name: read_rows(where, rows, [a])[a] for name, (where, a) in sources}

    def _vectors(
        self, captions: Sequence[str], arrays: Mapping[str, np.ndarray]
    ) -> dict[str, Tensor]:
        device = self._language_model.device
        tensors = {
            name: sent(torch.from_numpy(values), device).float() for name, values in arrays.items()
        }
        if self._encode_captions is not None:
            targets = vars(self._encode_captions(captions))
            tensors |= {name: t.float() for name, t in targets.items() if t is not None}
        return tensors


class CachedBatches(MadeAhead[CaptionBatch]):
    """Batches of some rows without end, resumable at any step (a `BatchSource` of training).

    A thread makes the next batch, and sends it to the device, while this one is in use.
    """

    def __init__(
        self,
        maker: BatchMaker,
        subset: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        reading: ReadingParams,
    ) -> None:
        """`batch_size` counts the examples of all processes.

        Raises StageError when the rows cannot fill one batch.
        """
        self._maker = maker
        self._rows = ShuffledRows(
            maker.sources,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            subset=subset,
            # A smaller last batch would be another contrastive loss, or none on some ranks.
            drop_last=True,
            params=reading,
        )
        if len(self._rows) == 0:
            raise StageError(
                f"training.batch_size is {batch_size}, but there are only {self._rows.num_rows} "
                "usable training rows: lower it, or add rows"
            )
        self._state = self._rows.state_dict()

    def _made(self) -> Generator[tuple[CaptionBatch, dict[str, Any]]]:
        while True:
            for batch in self._rows:
                # Each with its own position: this thread is a batch ahead of training.
                yield self._maker.make(batch.rows, batch.arrays), self._rows.state_dict()

    def _go_to(self, state: Mapping[str, Any]) -> None:
        self._rows.load_state_dict(state)
