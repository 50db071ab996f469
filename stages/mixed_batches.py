"""Batches of several corpora: so many examples of each in every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.bridge.mixed_batch import MixedBatch
from stages.cached_batches import CachedBatches
from stages.document_batches import DocumentBatches


class MixedBatches:
    """A `BatchSource` of training: a batch of each corpus a step, each with a place of its own."""

    def __init__(self, captions: CachedBatches | None, documents: DocumentBatches | None) -> None:
        self._captions, self._documents = captions, documents

    def __iter__(self) -> Iterator[MixedBatch]:
        captions = None if self._captions is None else iter(self._captions)
        documents = None if self._documents is None else iter(self._documents)
        while True:
            yield MixedBatch(
                None if captions is None else next(captions),
                None if documents is None else next(documents),
            )

    @property
    def num_cut(self) -> int:
        """Documents that did not fit, so far."""
        return 0 if self._documents is None else self._documents.num_cut

    def state_dict(self) -> dict[str, Any]:
        """The place in each corpus after the batch handed out last."""
        return {name: corpus.state_dict() for name, corpus in self._corpora().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from an earlier position."""
        for name, corpus in self._corpora().items():
            corpus.load_state_dict(state[name])

    def _corpora(self) -> dict[str, CachedBatches | DocumentBatches]:
        corpora = {"captions": self._captions, "documents": self._documents}
        return {name: corpus for name, corpus in corpora.items() if corpus is not None}
