"""The pass over interleaved documents against the plain formulation, and against captions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.document_objective import document_losses
from pipeline.bridge.document_streams import document_streams, prediction_counts
from pipeline.bridge.documents import Document, DocumentBatch, Drawn, Shown, Words
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import Losses, PackingDraws, training_losses
from pipeline.settings import Objective
from tests.plain import Plain
from tests.test_objective import (
    FLOAT32_INSIDE,
    LENGTHS,
    PARTS,
    PRESETS,
    build,
    captions_of,
    example_batch,
    relative_gradient_errors,
)
from tests.tiny_language_models import CONFIGURATIONS, NUM_WORDS

NUM_PICTURES = 4


def batch_of(documents: list[Document], seed: int = 0) -> DocumentBatch:
    """Pictures 1 and 3 are the same row."""
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(NUM_PICTURES, 10, generator=g, dtype=torch.float64)
    targets = torch.randn(NUM_PICTURES, 7, 12, generator=g, dtype=torch.float64)
    pooled[3] = pooled[1]
    return DocumentBatch(tuple(documents), pooled, targets, torch.tensor([5, 8, 2, 8]))


def compare(
    gill: MultimodalLanguageModel,
    plain: Plain,
    batch: DocumentBatch,
    objective: Objective,
    loss_tolerance: float = 1e-12,
    gradient_tolerance: float = 1e-9,
) -> None:
    expected = plain.document_losses(batch, objective)
    losses = document_losses(gill, batch, objective)
    for part in PARTS:
        value = getattr(losses, part).item()
        assert value == pytest.approx(expected[part].item(), rel=loss_tolerance, abs=1e-14), part
    gill.zero_grad()
    plain.zero_grad()
    assert losses.total.requires_grad or not expected["total"].requires_grad
    if not losses.total.requires_grad:
        return
    losses.total.backward()
    expected["total"].backward()
    theirs = {n: g for n, g in plain.gradients().items() if float(g.norm())}
    ours = {n: p.grad for n, p in gill.heads.named_parameters() if p.grad is not None}
    assert all(not float(ours[n].norm()) for n in ours.keys() - theirs.keys())
    if theirs:
        errors = relative_gradient_errors({n: ours[n] for n in theirs}, theirs)
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < gradient_tolerance, (worst, errors)


ids = st.lists(st.integers(3, NUM_WORDS - 1), min_size=1, max_size=6).map(tuple)
parts = st.one_of(
    st.builds(Words, ids, st.sampled_from(["no", "words", "image_token"])),
    st.builds(Shown, st.integers(0, NUM_PICTURES - 1)),
    st.builds(Drawn, st.integers(0, NUM_PICTURES - 1)),
)
documents = st.lists(st.lists(parts, min_size=1, max_size=6).map(tuple), min_size=1, max_size=5)
OBJECTIVES = {
    "paper": Objective.paper(),
    "released": Objective.released(),
    "tokens": Objective(token_reduction="tokens"),
    "images": Objective(captioning_softmax="words_and_images"),
}


@pytest.fixture(scope="module")
def opt64() -> tuple[MultimodalLanguageModel, Plain]:
    return build("opt", 2, Objective.paper(), torch.float64)


@pytest.fixture(scope="module")
def without_start() -> tuple[MultimodalLanguageModel, Plain]:
    return build("gpt2", 3, Objective.paper(), torch.float64, start=False)


@settings(max_examples=40, deadline=None)
@given(documents=documents, objective=st.sampled_from(list(OBJECTIVES)), seed=st.integers(0, 999))
def test_equals_the_plain_pass_on_any_documents(
    opt64: tuple[MultimodalLanguageModel, Plain],
    documents: list[Document],
    objective: str,
    seed: int,
) -> None:
    compare(*opt64, batch_of(documents, seed), OBJECTIVES[objective])


@settings(max_examples=20, deadline=None)
@given(documents=documents, objective=st.sampled_from(list(OBJECTIVES)), seed=st.integers(0, 999))
def test_equals_the_plain_pass_without_start_ids(
    without_start: tuple[MultimodalLanguageModel, Plain],
    documents: list[Document],
    objective: str,
    seed: int,
) -> None:
    compare(*without_start, batch_of(documents, seed), OBJECTIVES[objective])


STORY: Document = (
    Words((4, 5, 6), "words"),
    Drawn(0),
    Shown(0),
    Words((7, 8), "words"),
    Drawn(1),
    Shown(1),
    Words((9, 10, 11, 12), "image_token"),
    Drawn(2),
)
MIXED: list[Document] = [
    STORY,
    (Shown(2), Words((20, 21), "words")),
    (Words((30,), "image_token"),),
    (Drawn(3), Words((13, 14), "words"), Drawn(1)),
]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_serves_every_architecture(name: str) -> None:
    gill, plain = build(name, 3, Objective.released(), torch.float64)
    tolerances = (1e-6, 1e-5) if name in FLOAT32_INSIDE else (1e-12, 1e-9)
    compare(gill, plain, batch_of(MIXED), Objective.released(), *tolerances)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_document_of_one_caption_has_the_numbers_of_its_image_pass(preset: str) -> None:
    objective = PRESETS[preset].model_copy(update={"captioning_weight": 0.0})
    gill, _ = build("opt", 4, objective, torch.float64)
    captions = example_batch(LENGTHS, torch.float64)
    # Released, l_p predicts the caption's words as well.
    supervised: Literal["no", "image_token"] = "image_token" if preset == "released" else "no"
    batch = of_captions(captions, lambda i, ids: (Words(ids, supervised), Drawn(i)))
    draws = PackingDraws.same(len(captions), False)
    assert_same(gill, training_losses(gill, captions, objective, draws), batch, objective)


def test_a_document_that_begins_with_a_picture_has_the_numbers_of_the_captioning_pass() -> None:
    objective = Objective.paper().model_copy(
        update={"image_token_weight": 0.0, "retrieval_weight": 0.0, "generation_weight": 0.0}
    )
    # Where there are start ids, they stand behind the picture of a caption: another sequence.
    gill, _ = build("gpt2", 4, objective, torch.float64, start=False)
    captions = example_batch(LENGTHS, torch.float64)
    batch = of_captions(captions, lambda i, ids: (Shown(i), Words(ids, "words")))
    draws = PackingDraws.same(len(captions), False)
    assert_same(gill, training_losses(gill, captions, objective, draws), batch, objective)


def of_captions(
    captions: CaptionBatch, document: Callable[[int, tuple[int, ...]], Document]
) -> DocumentBatch:
    return DocumentBatch(
        tuple(document(i, tuple(ids)) for i, ids in enumerate(captions_of(captions))),
        captions.pooled,
        captions.targets,
        captions.rows,
    )


def assert_same(
    gill: MultimodalLanguageModel, expected: Losses, batch: DocumentBatch, objective: Objective
) -> None:
    losses = document_losses(gill, batch, objective)
    for part in PARTS:
        assert getattr(losses, part).item() == pytest.approx(
            getattr(expected, part).item(), rel=1e-12
        ), part
    gradients = []
    for one in (losses, expected):
        gill.zero_grad()
        one.total.backward()
        grads = {n: p.grad.clone() for n, p in gill.heads.named_parameters() if p.grad is not None}
        gradients.append({n: g for n, g in grads.items() if float(g.norm())})
    errors = relative_gradient_errors(*gradients)
    assert max(errors.values()) < 1e-9, errors


def test_places_of_a_document() -> None:
    """start s s | IMG IMG vis vis vis s s IMG IMG: words 1, 2 are read before anything trained."""
    document: Document = (
        Words((8, 9), "words"),
        Drawn(1),
        Shown(1),
        Words((7, 6), "image_token"),
        Drawn(0),
        Shown(0),  # nothing comes after it: it is not read
    )
    streams = document_streams([document], k=3, r=2, num_start=1)
    assert streams.prefix.source == [1, 2]
    assert streams.suffix.source == [-1] * 5 + [3, 4] + [-1] * 2
    assert streams.suffix.filled == [2, 3, 4, 0, 1, 7, 8]
    assert (streams.shown, streams.drawn, streams.follows) == ([1], [1, 0], [0])
    constant, dependent = streams.words
    assert (constant.predictors, constant.targets, dependent.targets) == ([0, 1], [1, 2], [])
    constant, dependent = streams.image_token
    # Place 0 is the start id, 1 and 2 the prefix, 3 and on the suffix; 5 is [IMG1].
    assert (constant.predictors, constant.targets) == ([2, 7, 8], [5, 3, 4])
    assert (dependent.predictors, dependent.targets) == ([9], [5])
    assert prediction_counts([document], 1) == (2, 4)


@settings(max_examples=100, deadline=None)
@given(documents=documents, num_start=st.integers(0, 2))
def test_counts_are_those_of_the_streams(documents: list[Document], num_start: int) -> None:
    streams = document_streams(documents, 2, 3, num_start)
    counts = [sum(len(p.targets) for p in pair) for pair in (streams.words, streams.image_token)]
    assert tuple(counts) == prediction_counts(documents, num_start)


def test_parts_and_joined_batches_are_the_batch() -> None:
    batch = batch_of(MIXED)
    joined = DocumentBatch.join([batch.part(0, 1), batch.part(1, 4)])
    for one, other in zip(joined.documents, batch.documents):
        assert len(one) == len(other)
        for part, whole in zip(one, other):
            if isinstance(part, Words):
                assert part == whole
            else:
                assert type(part) is type(whole)
                assert joined.rows[part.picture] == batch.rows[whole.picture]
                assert torch.equal(joined.targets[part.picture], batch.targets[whole.picture])
    assert batch.part(1, 2).rows.tolist() == [2]


def test_a_picture_in_two_places_is_no_negative_of_itself(
    opt64: tuple[MultimodalLanguageModel, Plain],
) -> None:
    gill, _ = opt64
    once = Objective(captioning_weight=0, image_token_weight=0, generation_weight=0)
    batch = batch_of([(Words((4,)), Drawn(1)), (Words((9, 5)), Drawn(3))])
    assert document_losses(gill, batch, once).total.item() == pytest.approx(0, abs=1e-12)
    apart = replace(batch, rows=torch.tensor([5, 8, 2, 9]))
    assert document_losses(gill, apart, once).total.item() > 0.1


def test_unfit_batches_are_refused(opt64: tuple[MultimodalLanguageModel, Plain]) -> None:
    with pytest.raises(InputError, match="document 1 is empty"):
        batch_of([STORY, ()])
    with pytest.raises(InputError, match="document 0 names picture 4 of 4"):
        batch_of([(Drawn(4),)])
    with pytest.raises(InputError, match="document 0 has a text without tokens"):
        batch_of([(Words(()), Drawn(0))])
    gill, _ = opt64
    with pytest.raises(InputError, match="exceeds the language model's 96 positions"):
        document_losses(gill, batch_of([(Words((5,) * 95), Drawn(0))]), Objective.paper())
