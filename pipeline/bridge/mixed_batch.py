"""A training batch of several corpora: captions and documents, each in its share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.documents import DocumentBatch


@dataclass(frozen=True)
class MixedBatch:
    """Captions and documents of one step; its length counts both. Either may be absent.

    The losses of a step are those of each corpus, weighted by its share of the examples; retrieval
    compares captions with captions and documents with documents.
    """

    captions: CaptionBatch | None
    documents: DocumentBatch | None

    def __post_init__(self) -> None:
        if not len(self):
            raise InputError("a batch of neither captions nor documents")

    def __len__(self) -> int:
        return sum(map(len, self.corpora))

    @property
    def corpora(self) -> list[CaptionBatch | DocumentBatch]:
        """Those that are there."""
        return [corpus for corpus in (self.captions, self.documents) if corpus is not None]

    @property
    def rows(self) -> Int64[Tensor, " N"]:
        """Rows of the caption table behind it: of captions, then of documents' pictures."""
        return torch.cat([corpus.rows for corpus in self.corpora])

    @property
    def num_tokens(self) -> int:
        """Tokens of text."""
        return sum(corpus.num_tokens for corpus in self.corpora)

    def to(self, device: torch.device | str) -> MixedBatch:
        """The same batch on `device`."""
        captions = None if self.captions is None else self.captions.to(device)
        documents = None if self.documents is None else self.documents.to(device)
        return MixedBatch(captions, documents)


def corpora_of(batch: CaptionBatch | MixedBatch) -> list[CaptionBatch | DocumentBatch]:
    """What a batch is made of."""
    return batch.corpora if isinstance(batch, MixedBatch) else [batch]


def is_of_share(place: int, share: int, whole: int) -> bool:
    """Whether place 0 <= n < whole is one of `share` places that lie evenly among `whole`."""
    return (place + 1) * share // whole > place * share // whole


def num_captions(batch: CaptionBatch | MixedBatch) -> int:
    """How many of its examples are captions."""
    captions = batch.captions if isinstance(batch, MixedBatch) else batch
    return 0 if captions is None else len(captions)
