"""Training batches of a chat model: documents of four streams, in exact shares of every step."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from cache import ReadingParams, ShuffledRows
from corpora.caption_table import CaptionTable
from gill_errors import StageError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.documents import Document, DocumentBatch
from pipeline.bridge.mixed_batch import MixedBatch, is_of_share
from stages.cached_batches import BatchMaker
from stages.chat_documents import ChatDocuments, usable
from stages.made_ahead import MadeAhead
from stages.reply_file import Reply


class ChatBatches(MadeAhead[MixedBatch]):
    """Mixed batches without end, of documents alone (a `BatchSource` of training).

    Every step has the same number of each stream. The rows of `asked` and `shown` come as those of
    captions do: each once an epoch. Which questions a step has, and every phrasing, depends on
    (seed, step) alone.
    """

    def __init__(
        self,
        maker: BatchMaker,
        table: CaptionTable,
        documents: ChatDocuments,
        replies: Sequence[Reply],
        subset: np.ndarray,
        shares: Mapping[str, int],
        *,
        seed: int,
        rank: int,
        world_size: int,
        reading: ReadingParams,
    ) -> None:
        """`shares`: documents of each stream in a step, over all processes.

        Raises StageError where the processes cannot have equal shares, or rows or replies are too
        few.
        """
        pictured = shares.get("asked", 0) + shares.get("shown", 0)
        parts = {
            "asked and shown": pictured,
            "told": shares.get("told", 0),
            "joined": shares.get("joined", 0),
        }
        if odd := next((name for name, count in parts.items() if count % world_size), None):
            raise StageError(
                f"training.mixture: {parts[odd]} documents a step are {odd}, which {world_size} "
                "processes cannot share alike: change the mixture or training.batch_size"
            )
        self._maker, self._table, self._documents = maker, table, documents
        self._shares, self._seed = dict(shares), seed
        self._rank, self._world_size = rank, world_size
        joined = usable(replies, "joined")
        rows = {reply.request.row for reply in joined if reply.request.row is not None}
        encoded = set(maker.usable(sorted(rows)).tolist())
        self._replies = {
            "told": usable(replies, "told"),
            "joined": [reply for reply in joined if reply.request.row in encoded],
        }
        self.num_left_out = len(joined) - len(self._replies["joined"])
        """Replies whose picture's features or targets could not be computed."""
        for name, fit in self._replies.items():
            if parts[name] and not fit:
                raise StageError(
                    f"training.mixture has {name}, but no reply serves it: set "
                    "training.replies.joined or training.replies.max_tokens higher"
                )
        self._rows = ShuffledRows(
            maker.sources,
            batch_size=pictured,
            seed=seed,
            rank=rank,
            world_size=world_size,
            subset=subset,
            drop_last=True,
            params=reading,
        )
        if len(self._rows) == 0:
            raise StageError(
                f"a step takes {pictured} rows (asked and shown), but there are only "
                f"{self._rows.num_rows} usable training rows: lower training.batch_size"
            )
        self._state = {**self._rows.state_dict(), "taken": 0}

    def _made(self) -> Generator[tuple[MixedBatch, dict[str, Any]]]:
        taken = self._state["taken"]
        while True:
            for batch in self._rows:
                made = self._make(self._maker.make(batch.rows, batch.arrays), taken)
                taken += 1
                yield made, {**self._rows.state_dict(), "taken": taken}

    def _make(self, seen: CaptionBatch, step: int) -> MixedBatch:
        """The documents of one step, of which `seen` holds the rows of `asked` and `shown`."""
        asked, all_rows = self._shares.get("asked", 0), self._rows.batch_size
        documents: list[Document] = []
        for number, caption in enumerate(self._table.captions(seen.rows.cpu().numpy())):
            # By the place in the whole step, so that it is the same on any number of processes;
            # those that are asked for lie evenly among all.
            place = self._rank * len(seen) + number
            is_asked = is_of_share(place, asked, all_rows)
            make = self._documents.asked if is_asked else self._documents.shown
            draws = random.Random(f"{self._seed} {step} {place}")
            documents.append(make(caption, number, draws))
        documents += [self._documents.told(reply) for reply in self._take("told", step)]
        batches = []
        if joined := self._take("joined", step):
            rows = [reply.request.row for reply in joined if reply.request.row is not None]
            batches.append(
                _documents(
                    [self._documents.joined(reply, n) for n, reply in enumerate(joined)],
                    self._maker.read(rows),
                )
            )
        return MixedBatch(None, DocumentBatch.join([_documents(documents, seen), *batches]))

    def _take(self, stream: Literal["told", "joined"], step: int) -> list[Reply]:
        """This process's replies of a step: all come equally often, shuffled anew every time."""
        share, replies = self._shares.get(stream, 0), self._replies[stream]
        own = share // self._world_size
        first = share * step + self._rank * own
        taken = []
        for place in range(first, first + own):
            turn, index = divmod(place, len(replies))
            order = random.Random(f"{stream} {self._seed} {turn}").sample(
                range(len(replies)), len(replies)
            )
            taken.append(replies[order[index]])
        return taken

    def _go_to(self, state: Mapping[str, Any]) -> None:
        self._rows.load_state_dict(state)


def asked_and_shown(
    table: CaptionTable, documents: ChatDocuments, seen: CaptionBatch
) -> DocumentBatch:
    """Every row once as a request and once as a picture with a question."""
    draws = random.Random(0)
    captions = table.captions(seen.rows.cpu().numpy())
    asked = [documents.asked(caption, n, draws) for n, caption in enumerate(captions)]
    shown = [documents.shown(caption, n, draws) for n, caption in enumerate(captions)]
    return _documents([*asked, *shown], seen)


def _documents(documents: Sequence[Document], seen: CaptionBatch) -> DocumentBatch:
    return DocumentBatch(
        tuple(documents), seen.pooled, seen.targets, seen.rows, seen.pooled_targets
    )
