"""Documents as training reads them: what is written, in which order, and going on anywhere."""

from collections.abc import Iterable
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from corpora.document_table import Parts
from gill_errors import StageError
from pipeline.bridge.documents import Document, DocumentBatch, Drawn, Shown, Words
from settings.params import largest_remainder
from stages.cached_batches import BatchMaker
from stages.document_batches import DocumentBatches, DocumentMaker
from stages.mixed_batches import MixedBatches
from tests.test_cached_batches import batches, maker  # noqa: F401
from tests.tiny_language_models import tiny_tokenizer

STORY: Parts = ("w1 w2", 3, "w4", 5, "w6", 7)
DOCUMENTS: list[Parts] = [(f"w{n}", n, "a", 20 - n) for n in range(1, 8)]


def writer(max_tokens: int | None = None, share: float = 0.0, positions: int = 96) -> DocumentMaker:
    model = SimpleNamespace(tokenizer=tiny_tokenizer(), max_positions=positions, start_ids=[2])
    return DocumentMaker(model, 2, 3, max_tokens, share)  # type: ignore[arg-type]


def words(text: str) -> Words:
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return Words(tuple(ids), "words")


def write(parts: Parts, **given: object) -> Document:
    return writer(**given).write(parts, np.random.default_rng(0))  # type: ignore[arg-type]


def test_a_picture_is_produced_after_text_and_then_shown() -> None:
    assert write(STORY) == (
        *(words("w1 w2"), Drawn(3), Shown(3)),
        *(words("w4"), Drawn(5), Shown(5)),
        *(words("w6"), Drawn(7), Shown(7)),
    )
    assert write((9, "w1", 8)) == (Shown(9), words("w1"), Drawn(8), Shown(8))


def test_without_pictures_between_the_texts_are_one() -> None:
    assert write(STORY, share=1.0) == (words("w1 w2 w4 w6"), Drawn(7), Shown(7))
    assert write(("w1", 3, "w4"), share=1.0) == (words("w1"), Drawn(3), Shown(3), words("w4"))


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        # start w w IMG*3 vis*2 w IMG*3 vis*2 w ...
        (16, (words("w1 w2"), Drawn(3), Shown(3), words("w4"), Drawn(5), Shown(5), words("w6"))),
        (13, (words("w1 w2"), Drawn(3), Shown(3), words("w4"), Drawn(5))),
        (11, (words("w1 w2"), Drawn(3), Shown(3), words("w4"))),
        (7, (words("w1 w2"), Drawn(3))),
        (2, (words("w1"),)),
    ],
)
def test_what_does_not_fit_is_left_out_from_the_end_and_counted(
    most: int, expected: Document
) -> None:
    made = writer(max_tokens=most)
    assert made.write(STORY, np.random.default_rng(0)) == expected
    assert made.num_cut == 1
    made = writer(positions=most)
    assert made.write(STORY, np.random.default_rng(0)) == expected
    whole = writer(max_tokens=20)
    whole.write(STORY, np.random.default_rng(0))
    assert whole.num_cut == 0


def source(maker: BatchMaker, share: float = 0.5, **given: int) -> DocumentBatches:  # noqa: F811
    options = {"batch_size": 2, "seed": 3, "rank": 0, "world_size": 1, **given}
    return DocumentBatches(maker, writer(share=share), DOCUMENTS, **options)


def told(found: Iterable[DocumentBatch]) -> list[list[list[object]]]:
    """Documents with the rows of their pictures."""
    return [
        [
            [p.ids if isinstance(p, Words) else (type(p), int(b.rows[p.picture])) for p in doc]
            for doc in b.documents
        ]
        for b in found
    ]


def test_batches_hold_the_vectors_of_their_pictures(maker: BatchMaker) -> None:  # noqa: F811
    for batch in islice(source(maker), 4):
        for picture, row in enumerate(batch.rows.tolist()):
            assert batch.pooled[picture].tolist() == [row / 8] * 3
            assert batch.targets[picture].unique().tolist() == [row / 8]


def test_every_document_comes_once_an_epoch_in_an_order_of_its_own(
    maker: BatchMaker,  # noqa: F811
) -> None:
    found = told(islice(source(maker, share=0.0), 6))
    epochs = [[doc for batch in found[i : i + 3] for doc in batch] for i in (0, 3)]
    for epoch in epochs:
        assert len({str(doc) for doc in epoch}) == 6
    assert epochs[0] != epochs[1]
    # Which pictures stay is drawn anew in each epoch.
    lengths = [len(doc) for b in islice(source(maker), 30) for doc in b.documents]
    assert set(lengths) == {3, 6}


def test_two_processes_share_the_documents_of_one_and_a_run_goes_on_anywhere(
    maker: BatchMaker,  # noqa: F811
) -> None:
    whole = told(islice(source(maker), 7))
    parts = [told(islice(source(maker, rank=rank, world_size=2), 7)) for rank in range(2)]
    assert [a + b for a, b in zip(*parts)] == whole
    begun = source(maker)
    first = told(islice(begun, 4))
    later = source(maker)
    later.load_state_dict(begun.state_dict())
    assert first + told(islice(later, 3)) == whole
    with pytest.raises(StageError, match="saved with 2 a step, not 4"):
        source(maker, batch_size=4).load_state_dict(begun.state_dict())


def test_a_mixture_has_so_many_of_each_and_goes_on_in_both(maker: BatchMaker) -> None:  # noqa: F811
    def mixed() -> MixedBatches:
        return MixedBatches(batches(maker), source(maker))

    def rows(found: Iterable) -> list[list[int]]:
        return [batch.rows.tolist() for batch in found]

    whole = rows(islice(mixed(), 8))
    begun = mixed()
    some = list(islice(begun, 3))
    assert [(len(b), len(b.captions or []), len(b.documents or [])) for b in some] == [
        (6, 4, 2)
    ] * 3
    later = mixed()
    later.load_state_dict(begun.state_dict())
    assert rows(some) + rows(islice(later, 5)) == whole


def test_what_cannot_be_dealt_is_one_line(maker: BatchMaker) -> None:  # noqa: F811
    with pytest.raises(StageError, match="gives 3 documents a step, which 2 processes cannot"):
        source(maker, batch_size=3, world_size=2)
    with pytest.raises(StageError, match="8 documents a step, but there are only 7 usable"):
        source(maker, batch_size=8)


def test_shares_are_exact() -> None:
    assert largest_remainder({"captions": 1, "documents": 1}, 64) == {
        "captions": 32,
        "documents": 32,
    }
    assert largest_remainder({"captions": 2, "documents": 1}, 64) == {
        "captions": 43,
        "documents": 21,
    }
    assert largest_remainder({"a": 1, "b": 1, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}
    assert largest_remainder({"a": 0, "b": 0.3}, 7) == {"a": 0, "b": 7}
