"""Which token of a document goes where: the index lists of the pass over documents.

    document   s_1 .. s_T | IMG1 .. IMGr vis_1 .. vis_k s'_1 .. s'_T'
               prefix     | suffix

The prefix ends before the first trained input (a visual vector, an [IMG] token): it is read without
gradient. What stands after the last place that predicts or is an [IMG] token is not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.bridge.documents import Document, Shown, Words
from pipeline.bridge.streams import FILLED, Stream

Kind = Literal["words", "image_token"]


@dataclass
class Predictions:
    """Places whose hidden state predicts `targets`, one for one.

    A place counts the last start id, where there is one, then the prefixes', then the suffixes'.
    """

    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


@dataclass
class DocumentStreams:
    """The pass over documents, in two parts."""

    prefix: Stream = field(default_factory=Stream)
    suffix: Stream = field(default_factory=Stream)
    """`filled`: k places per picture of `shown`, then r per picture of `drawn`."""
    follows: list[int] = field(default_factory=list)
    """The prefix that each suffix follows; -1: the start ids alone."""
    shown: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    words: tuple[Predictions, Predictions] = field(
        default_factory=lambda: (Predictions(), Predictions())
    )
    """Of l_c: from constant hidden states, from dependent ones."""
    image_token: tuple[Predictions, Predictions] = field(
        default_factory=lambda: (Predictions(), Predictions())
    )
    """Of l_p, likewise."""


@dataclass
class _Read:
    """One document as it is read; places count from 0 after the start ids."""

    source: list[int]
    """Indices of words; `FILLED` where a trained vector stands."""
    shown: list[tuple[int, int]]
    """Picture and first of its k places."""
    drawn: list[tuple[int, int]]
    """Picture and first of its r places."""
    predictions: list[tuple[int, int, Kind, bool]]
    """Predictor (-1: the last start id), target, what it belongs to, whether it is constant."""


def document_streams(
    documents: Sequence[Document], k: int, r: int, num_start: int
) -> DocumentStreams:
    """The pass over documents whose words are numbered after the start ids, in reading order.

    One past the last word stands for [IMG1].
    """
    image = num_start + sum(
        len(part.ids) for document in documents for part in document if isinstance(part, Words)
    )
    streams, word = DocumentStreams(), num_start
    # The prefixes' places come before all suffixes': those of suffixes are known at the end.
    read: list[tuple[_Read, int, int, int]] = []
    for document in documents:
        own = _read(document, word, image, k, r, num_start)
        word += sum(len(part.ids) for part in document if isinstance(part, Words))
        cut = min([place for _, place in own.shown + own.drawn], default=len(own.source))
        before, after = len(streams.prefix.source), len(streams.suffix.source)
        follows = -1
        if cut:
            follows = len(streams.prefix.lengths)
            streams.prefix.put(own.source[:cut])
            streams.prefix.lengths.append(cut)
        if cut < len(own.source):
            streams.follows.append(follows)
            streams.suffix.put(own.source[cut:])
            streams.suffix.lengths.append(len(own.source) - cut)
        read.append((own, cut, before, after))
    first = 1 if num_start else 0
    for own, cut, before, after in read:
        shift = after - cut
        for picture, place in own.shown:
            streams.shown.append(picture)
            streams.suffix.filled += range(place + shift, place + shift + k)
        for place, target, kind, constant in own.predictions:
            if place < 0:
                index = 0
            elif place < cut:
                index = first + before + place
            else:
                index = first + len(streams.prefix.source) + place + shift
            kinds = streams.words if kind == "words" else streams.image_token
            # Before the first trained input nothing depends on one.
            chosen = kinds[0 if constant or place < cut else 1]
            chosen.predictors.append(index)
            chosen.targets.append(target)
    for own, cut, _, after in read:
        for picture, place in own.drawn:
            streams.drawn.append(picture)
            streams.suffix.filled += range(place + after - cut, place + after - cut + r)
    return streams


def prediction_counts(documents: Sequence[Document], num_start: int) -> tuple[int, int]:
    """How many targets l_c and l_p have in `document_streams`, without making it."""
    counts = {"no": 0, "words": 0, "image_token": 0}
    for document in documents:
        for place, part in enumerate(document):
            # Nothing stands before the first token of a document to predict it.
            unseen = 1 if place == 0 and not num_start else 0
            if isinstance(part, Words):
                counts[part.supervised] += len(part.ids) - unseen
            elif not isinstance(part, Shown):
                counts["image_token"] += 1 - unseen
    return counts["words"], counts["image_token"]


def _read(document: Document, word: int, image: int, k: int, r: int, num_start: int) -> _Read:
    own = _Read([], [], [], [])
    end = 0
    for part in document:
        place = len(own.source)
        predicted = place or num_start
        if isinstance(part, Words):
            ids = range(word, word + len(part.ids))
            word += len(ids)
            own.source += ids
            if part.supervised == "no":
                continue
            constant = part.supervised == "image_token"
            for target in ids if predicted else ids[1:]:
                before = place + target - ids[0] - 1
                own.predictions.append((before, target, part.supervised, constant))
                end = max(end, before + 1)
        elif isinstance(part, Shown):
            own.shown.append((part.picture, place))
            own.source += [FILLED] * k
        else:
            if predicted:
                own.predictions.append((place - 1, image, "image_token", False))
            own.drawn.append((part.picture, place))
            own.source += [FILLED] * r
            end = len(own.source)
    del own.source[end:]
    own.shown = [(picture, place) for picture, place in own.shown if place < end]
    return own
