"""What a step of captions and interleaved documents reads. For `stages doctor`.

Lengths are assumptions, as those of captions are: a document is five texts, each as long as a
caption and with its picture behind it, as a story of VIST; texts are cut where it would not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline.bridge.batch import CaptionBatch, take_examples
from pipeline.bridge.documents import Document, DocumentBatch, Drawn, Shown, Words
from pipeline.bridge.heads import HeadSizes
from pipeline.bridge.mixed_batch import MixedBatch

PICTURES = 5
"""Of a document, and texts before them."""


def mixed_step(
    captions: CaptionBatch, shares: Mapping[str, int], sizes: HeadSizes, room: int
) -> MixedBatch:
    """The captions and documents of a step.

    Args:
        captions: on the meta device; their lengths are those of the documents' texts too.
        shares: captions and documents of a step; no more than captions are given.
        room: positions of a document, start ids apart.
    """
    count = len(captions)
    num_captions, num_documents = (shares.get(c, 0) for c in ("captions", "documents"))
    lengths = captions.offsets.diff().tolist()
    most = max(room // PICTURES - sizes.r - sizes.k, 1)
    documents = tuple(
        story(
            [(0,) * min(lengths[(number + i) % count], most) for i in range(PICTURES)],
            number * PICTURES,
        )
        for number in range(num_documents)
    )
    pictures = PICTURES * len(documents)
    with captions.pooled.device:
        batch = DocumentBatch(
            documents,
            torch.zeros(pictures, sizes.d),
            torch.zeros(pictures, sizes.L, sizes.D),
            torch.arange(pictures),
            None if sizes.D_pooled is None else torch.zeros(pictures, sizes.D_pooled),
        )
    alone = take_examples(captions, 0, num_captions) if num_captions else None
    return MixedBatch(alone, batch if documents else None)


def story(texts: Sequence[tuple[int, ...]], first: int) -> Document:
    """Texts, each with a picture behind it that is produced and then shown; the pictures are
    `first`, `first` + 1, ... of the batch."""
    document: list[Words | Shown | Drawn] = []
    for picture, ids in enumerate(texts, first):
        document += [Words(ids, "words"), Drawn(picture), Shown(picture)]
    return tuple(document)
