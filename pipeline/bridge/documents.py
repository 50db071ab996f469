"""Interleaved documents: text and pictures in reading order, and batches of them.

    (Words(ids, "no"), Drawn(0), Shown(0), Words(ids, "words"))
    start s_1 .. s_T IMG1 .. IMGr  vis_1 .. vis_k  s'_1 .. s'_T'

The language model's start ids stand before each document. P pictures in a batch, d visual width,
L x D the target of the image generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gill_errors import InputError
from pipeline.devices import sent


@dataclass(frozen=True)
class Words:
    """Text: ids without start ids and [IMG] tokens."""

    ids: tuple[int, ...]
    supervised: Literal["no", "words", "image_token"] = "no"
    """What is learnt here. words: to predict every token, as l_c does. image_token: that no [IMG1]
    comes here; every token is predicted over words and [IMG] rows from constant hidden states, so
    that the loss, a part of l_p, reaches the [IMG] rows alone. no: nothing."""


@dataclass(frozen=True)
class Shown:
    """A picture that is read: its k visual vectors."""

    picture: int
    """Which of the batch's."""


@dataclass(frozen=True)
class Drawn:
    """A picture that is to be produced: [IMG1..r], of which [IMG1] is predicted."""

    picture: int
    """Which of the batch's: its target is generation's, its pooled vector retrieval's."""


Document = tuple[Words | Shown | Drawn, ...]


@dataclass(frozen=True)
class DocumentBatch:
    """Documents with the features and targets of their pictures.

    Raises:
        ValueError: a document or text is empty, or names a picture that is not there.
    """

    documents: tuple[Document, ...]
    pooled: Float[Tensor, "P d"]
    """v_phi(x): the visual encoder's pooled vector before any projection."""
    targets: Float[Tensor, "P L D"]
    """T_psi of each picture's caption; of pictures that are only shown it is never read."""
    rows: Int64[Tensor, " P"]
    """Rows of the stores. Equal rows are one picture, which is no negative of itself."""
    pooled_targets: Float[Tensor, "P D_pooled"] | None = None
    """The pooled text vector, for generators that also need one."""

    def __post_init__(self) -> None:
        for number, document in enumerate(self.documents):
            if not document:
                raise InputError(f"document {number} is empty")
            for part in document:
                if isinstance(part, Words) and not part.ids:
                    raise InputError(f"document {number} has a text without tokens")
                if not isinstance(part, Words) and not 0 <= part.picture < len(self.pooled):
                    raise InputError(
                        f"document {number} names picture {part.picture} of {len(self.pooled)}"
                    )

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(
            len(part.ids) for doc in self.documents for part in doc if isinstance(part, Words)
        )

    @property
    def drawn(self) -> list[int]:
        """The picture of every `Drawn`, in order."""
        return [part.picture for doc in self.documents for part in doc if isinstance(part, Drawn)]

    def to(self, device: torch.device | str) -> DocumentBatch:
        """The same batch with every tensor on `device`."""
        there = torch.device(device)
        moved: dict[str, Any] = {n: sent(t, there) for n, t in self._tensors().items()}
        return replace(self, **moved)

    def part(self, start: int, stop: int) -> DocumentBatch:
        """Documents `start` to `stop`, with their own pictures alone."""
        documents = self.documents[start:stop]
        pictures = sorted(
            {part.picture for doc in documents for part in doc if not isinstance(part, Words)}
        )
        place = {picture: new for new, picture in enumerate(pictures)}
        renumbered = tuple(
            tuple(
                part if isinstance(part, Words) else type(part)(place[part.picture])
                for part in document
            )
            for document in documents
        )
        own = {n: t[pictures] for n, t in self._tensors().items()}
        return replace(self, documents=renumbered, **own)

    @classmethod
    def join(cls, batches: Sequence[DocumentBatch]) -> DocumentBatch:
        """One batch of the documents of several."""
        documents: list[Document] = []
        before = 0
        for batch in batches:
            documents += [
                tuple(
                    part if isinstance(part, Words) else type(part)(part.picture + before)
                    for part in document
                )
                for document in batch.documents
            ]
            before += len(batch.pooled)
        tensors = [batch._tensors() for batch in batches]
        return cls(tuple(documents), **{n: torch.cat([t[n] for t in tensors]) for n in tensors[0]})

    def _tensors(self) -> dict[str, Any]:
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "documents"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
