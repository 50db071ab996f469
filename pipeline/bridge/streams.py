"""Which token goes where: the index lists of the two training passes, in plain Python.

A pass is one packed stream of tokens. Its `source` lists, for every place of the stream, an index
into the *words* of the step, that is the start ids followed by all caption tokens of the batch; a
place that a trained vector fills (a visual token, an [IMG] token) says `FILLED`. `targets` index
the words too, and one past the last word stands for [IMG1].

Examples are grouped into rows: `(i,)` alone, or a packed pair `(i, i + 1)` (section 3.4).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gill_errors import InputError

FILLED = -1

Row = tuple[int, ...]


def pair_rows(num_examples: int, packed: Sequence[bool]) -> list[Row]:
    """Rows of a batch in which pair i, that is examples 2i and 2i + 1, is packed where told.

    `pair_rows(5, [True, False])` is `[(0, 1), (2,), (3,), (4,)]`.

    Raises:
        ValueError: not one entry of `packed` per complete pair.
    """
    if len(packed) != num_examples // 2:
        raise InputError(
            f"{num_examples} examples make {num_examples // 2} pairs, got {len(packed)}"
        )
    rows: list[Row] = []
    for i, together in enumerate(packed):
        rows += [(2 * i, 2 * i + 1)] if together else [(2 * i,), (2 * i + 1,)]
    if num_examples % 2:
        rows.append((num_examples - 1,))
    return rows


@dataclass
class Stream:
    """One packed pass: what is read, how it falls into sequences, and what is predicted where."""

    source: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    """Places of the trained vectors, in the order in which they are given."""
    predictors: list[int] = field(default_factory=list)
    """Places whose hidden state predicts `targets`, one for one."""
    targets: list[int] = field(default_factory=list)

    def put(self, words: Sequence[int]) -> None:
        """Append words."""
        self.source += words

    def fill(self, count: int) -> None:
        """Append places for `count` trained vectors."""
        self.filled += range(len(self.source), len(self.source) + count)
        self.source += [FILLED] * count

    def predict(self, targets: Sequence[int], first_predictor: int) -> None:
        """Supervise consecutive places, from `first_predictor` on."""
        self.predictors += range(first_predictor, first_predictor + len(targets))
        self.targets += targets


def captioning_stream(
    lengths: Sequence[int], rows: Sequence[Row], k: int, num_start: int, supervise_start: bool
) -> Stream:
    """The captioning pass (Eq. 1): `[vis start s_1 .. s_T-1]`.

    A packed pair is `[vis start s_1 .. s_T vis' s'_1 .. s'_T'-1]`: only the first text of a row has
    start ids (UPSTREAM 23), and the last token of a row is predicted but never read.
    `supervise_start` predicts the start ids too, from the last visual token (UPSTREAM 2).
    """
    caption = _captions(lengths, num_start)
    start = range(num_start)
    stream = Stream()
    for row in rows:
        begin = len(stream.source)
        for i in row:
            stream.fill(k)
            # The place whose state predicts what comes next: first the last visual token.
            last_read = len(stream.source) - 1
            if i == row[0]:
                stream.put(start)
                if supervise_start:
                    stream.predict(start, last_read)
                # The last start id predicts s_1; where there is none, still the last visual token.
                last_read = len(stream.source) - 1
            stream.predict(caption[i], last_read)
            # Within a pair the last token is read: the second example sees the whole first caption.
            stream.put(caption[i] if i != row[-1] else caption[i][:-1])
        stream.lengths.append(len(stream.source) - begin)
    return stream


def captioning_count(
    lengths: Sequence[int], rows: Sequence[Row], num_start: int, supervise_start: bool
) -> int:
    """How many targets `captioning_stream` has, without making it."""
    return sum(lengths) + (num_start * len(rows) if supervise_start else 0)


@dataclass
class ImageStreams:
    """The shared pass of retrieval and generation, in two parts."""

    prefix: Stream
    """From after the start ids up to the first [IMG1] of each row: depends on nothing trainable.

    The start ids are the same for all rows and read once: the last of them, where there is one, is
    place 0 of `predictors`, and the stream's own places count from 1.
    """
    suffix: Stream
    """From there on: depends on `E_img`. `filled` are its [IMG] places, r per example in order."""


def image_streams(
    lengths: Sequence[int],
    rows: Sequence[Row],
    r: int,
    num_start: int,
    supervise_captions: bool,
    supervise_second: bool,
) -> ImageStreams:
    """The pass over `[start s_1 .. s_T IMG1 .. IMGr]`, packed `[start s IMG.. s' IMG..]`.

    [IMG1] is always predicted, after the last caption token (Eq. 2); `supervise_captions` predicts
    the caption tokens too (UPSTREAM 3); without `supervise_second` nothing is predicted for the
    second caption of a pair (UPSTREAM 5).
    """
    caption = _captions(lengths, num_start)
    # One past the last word.
    image = num_start + sum(lengths)
    # Place 0 of the hidden states is the last start id, which is not in this stream.
    own = 1 if num_start else 0
    prefix, suffix = Stream(), Stream()
    for row in rows:
        first, *others = row
        begin = len(prefix.source)
        prefix.put(caption[first])
        # s_1 is predicted by the last start id; without one, nothing stands before it.
        if supervise_captions and num_start:
            prefix.predict(caption[first][:1], 0)
        if supervise_captions:
            # s_(t+1) from s_t, and [IMG1] from s_T: none of these states has seen an [IMG] token.
            prefix.predict(caption[first][1:], begin + own)
        prefix.predict([image], len(prefix.source) - 1 + own)
        prefix.lengths.append(len(prefix.source) - begin)

        # A second caption sees the first one's [IMG] tokens: it depends on E_img, so it is here.
        begin = len(suffix.source)
        suffix.fill(r)
        for i in others:
            last_image = len(suffix.source) - 1
            suffix.put(caption[i])
            if supervise_second and supervise_captions:
                # s'_1 from the first caption's [IMGr], then as before; [IMG1] from s'_T'.
                suffix.predict([*caption[i], image], last_image)
            elif supervise_second:
                suffix.predict([image], len(suffix.source) - 1)
            suffix.fill(r)
        suffix.lengths.append(len(suffix.source) - begin)
    return ImageStreams(prefix, suffix)


def image_token_count(
    lengths: Sequence[int],
    rows: Sequence[Row],
    num_start: int,
    supervise_captions: bool,
    supervise_second: bool,
) -> int:
    """How many targets both parts of `image_streams` have, without making them."""
    supervised = [i for row in rows for i in (row if supervise_second else row[:1])]
    count = len(supervised)
    if supervise_captions:
        count += sum(lengths[i] for i in supervised)
        # Nothing stands before the first token of a row to predict it.
        count -= 0 if num_start else len(rows)
    return count


def _captions(lengths: Sequence[int], num_start: int) -> list[list[int]]:
    """Word indices of each caption."""
    captions, begin = [], num_start
    for length in lengths:
        captions.append(list(range(begin, begin + length)))
        begin += length
    return captions
