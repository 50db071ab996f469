"""Training batches of documents: shuffled documents with the vectors of their pictures.

How a document is read: its texts are to be predicted; a picture that text stands before is produced
there ([IMG1..r]) and then shown (k visual vectors), any other one is shown alone. In a share of the
documents, drawn anew in each epoch, only the last picture stays. What does not fit is left out from
the end: words one by one, pictures whole.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from corpora.document_table import Parts
from gill_errors import StageError
from pipeline.bridge.documents import Document, DocumentBatch, Drawn, Shown, Words
from pipeline.frozen.language_model import LanguageModel
from stages.cached_batches import BatchMaker
from stages.made_ahead import MadeAhead


class DocumentMaker:
    """Writes documents as the language model reads them."""

    def __init__(
        self,
        language_model: LanguageModel,
        k: int,
        r: int,
        max_tokens: int | None = None,
        without_pictures_between: float = 0.0,
    ) -> None:
        """`max_tokens` counts all positions, start ids too; by default the model's."""
        self._tokenizer, self._k, self._r = language_model.tokenizer, k, r
        most = language_model.max_positions
        self._room = min(most, max_tokens or most) - len(language_model.start_ids)
        self._without_between = without_pictures_between
        self.num_cut = 0
        """Documents that did not fit, so far."""

    def write(self, parts: Parts, draws: np.random.Generator) -> Document:
        """One document; pictures are rows of the caption table."""
        kept = list(parts)
        if draws.random() < self._without_between:
            last = max(place for place, part in enumerate(kept) if isinstance(part, int))
            kept = [p for place, p in enumerate(kept) if isinstance(p, str) or place == last]
        document: list[Words | Shown | Drawn] = []
        room = self._room
        for part in _joined(kept):
            if isinstance(part, str):
                ids = tuple(self._tokenizer(part, add_special_tokens=False)["input_ids"])
                if ids[:room]:
                    document.append(Words(ids[:room], "words"))
                room -= len(ids)
            else:
                if any(isinstance(before, Words) for before in document):
                    room -= self._r
                    document += [Drawn(part)] if room >= 0 else []
                room -= self._k
                document += [Shown(part)] if room >= 0 else []
            if room < 0:
                self.num_cut += 1
                break
        return tuple(document)


def _joined(parts: Sequence[str | int]) -> list[str | int]:
    """Neighbouring texts as one, with a space between them, as talks read them."""
    joined: list[str | int] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(before := joined[-1], str):
            joined[-1] = f"{before} {part}"
        else:
            joined.append(part)
    return joined


class DocumentBatches(MadeAhead[DocumentBatch]):
    """Batches of documents without end, resumable at any step by any number of processes.

    Which documents a step has depends on (seed, epoch, batch size) alone; each process takes an
    equal stretch of them. A thread makes the next batch while this one is in use.
    """

    def __init__(
        self,
        maker: BatchMaker,
        writer: DocumentMaker,
        documents: Sequence[Parts],
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`batch_size` counts the documents of all processes.

        Raises StageError where documents cannot fill one batch, or be dealt equally.
        """
        self._maker, self._writer = maker, writer
        rows = {part for parts in documents for part in parts if isinstance(part, int)}
        usable = set(maker.usable(sorted(rows)).tolist())
        without = [
            tuple(p for p in parts if isinstance(p, str) or p in usable) for parts in documents
        ]
        self._documents = [p for p in without if any(isinstance(part, int) for part in p)]
        self._batch_size, self._seed = batch_size, seed
        if batch_size % world_size:
            raise StageError(
                f"training.mixture gives {batch_size} documents a step, which {world_size} "
                "processes cannot share equally: choose other weights"
            )
        share = batch_size // world_size
        self._own = slice(rank * share, (rank + 1) * share)
        if len(self._documents) < batch_size:
            raise StageError(
                f"training.mixture gives {batch_size} documents a step, but there are only "
                f"{len(self._documents)} usable ones: lower their weight, or add documents"
            )
        self._state = {"epoch": 0, "step": 0, "batch_size": batch_size}

    def _made(self) -> Generator[tuple[DocumentBatch, dict[str, Any]]]:
        epoch, step = self._state["epoch"], self._state["step"]
        while True:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._documents))
            while (step + 1) * self._batch_size <= len(order):
                here = order[step * self._batch_size :][: self._batch_size][self._own]
                step += 1
                yield self._make(here, epoch), {**self._state, "epoch": epoch, "step": step}
            epoch, step = epoch + 1, 0

    def _make(self, numbers: np.ndarray, epoch: int) -> DocumentBatch:
        written = [
            self._writer.write(
                self._documents[number], np.random.default_rng([self._seed, epoch, 1, number])
            )
            for number in numbers.tolist()
        ]
        return with_vectors(self._maker, written)

    @property
    def num_cut(self) -> int:
        """Documents that did not fit, so far."""
        return self._writer.num_cut

    def _go_to(self, state: Mapping[str, Any]) -> None:
        if state["batch_size"] != self._batch_size:
            raise StageError(
                f"the place in the documents was saved with {state['batch_size']} a step, not "
                f"{self._batch_size}: restore training.mixture, or train anew"
            )


def with_vectors(maker: BatchMaker, documents: Sequence[Document]) -> DocumentBatch:
    """A batch of documents whose pictures are rows of the caption table, with their vectors."""
    rows = sorted(
        {part.picture for doc in documents for part in doc if not isinstance(part, Words)}
    )
    place = {row: picture for picture, row in enumerate(rows)}
    numbered = tuple(
        tuple(p if isinstance(p, Words) else type(p)(place[p.picture]) for p in document)
        for document in documents
    )
    return maker.documents(numbered, np.asarray(rows, np.int64))
