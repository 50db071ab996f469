"""BLEU, ROUGE-L and CIDEr against published numbers and the recorded ones of coco-caption."""

import json
from pathlib import Path

import pytest

from pipeline.text_metrics import bleu, caption_scores, cider, rouge_l

# Scored with pycocoevalcap 1.2 on the words as they stand here.
HYPOTHESES = [
    "a man rides a brown horse along the beach",
    "two dogs run",
    "a red double-decker bus on a city street in the rain at night",
]
REFERENCES = [
    ["a person riding a horse on the beach", "a man rides a horse along the sea"],
    ["two dogs run through the tall grass", "a pair of dogs are running", "dogs run"],
    ["a red bus on a street", "a double-decker bus drives down a city street in the rain"],
]
BLEU = [0.8799999999648, 0.8246211250882983, 0.6854870800825895, 0.5327021596066746]
ROUGE_L = [0.8323586744639376, 1.0, 0.8459167950693374]
CIDER = [3.1793277848074992, 2.597551379125693, 3.0608530606819584]


def words(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines]


@pytest.fixture(scope="module")
def published(shared_data: Path) -> dict:
    return json.loads((shared_data / "nlgeval_examples/expected_scores.json").read_text())


def test_corpus_scores_are_the_published_ones(published: dict, shared_data: Path) -> None:
    folder = shared_data / "nlgeval_examples"
    hypotheses, first, second = (
        words((folder / name).read_text().splitlines())
        for name in ("hyp.txt", "ref1.txt", "ref2.txt")
    )
    references = [list(pair) for pair in zip(first, second, strict=True)]
    expected = published["examples (hyp.txt vs ref1.txt, ref2.txt)"]
    for n, score in enumerate(bleu(hypotheses, references), start=1):
        assert score == pytest.approx(expected[f"Bleu_{n}"], abs=5e-7)
    assert sum(rouge_l(hypotheses, references)) / 2 == pytest.approx(expected["ROUGE_L"], abs=5e-7)
    assert sum(cider(hypotheses, references)) / 2 == pytest.approx(expected["CIDEr"], abs=5e-7)


def test_sentence_scores_are_the_published_ones(published: dict) -> None:
    checked = 0
    for case in published["single"]:
        hypothesis, references = words([case["hyp"]]), [words(case["refs"])]
        scores = {f"Bleu_{n}": s for n, s in enumerate(bleu(hypothesis, references), start=1)}
        scores["ROUGE_L"] = rouge_l(hypothesis, references)[0]
        scores["CIDEr"] = cider(hypothesis, references)[0]
        for name in scores.keys() & case.keys():
            assert scores[name] == pytest.approx(case[name], abs=1e-6), (case["hyp"], name)
            checked += 1
    assert checked == 15


def test_scores_are_those_of_the_coco_evaluation() -> None:
    hypotheses, references = words(HYPOTHESES), [words(group) for group in REFERENCES]
    assert bleu(hypotheses, references) == pytest.approx(BLEU, abs=1e-12)
    assert rouge_l(hypotheses, references) == pytest.approx(ROUGE_L, abs=1e-12)
    assert cider(hypotheses, references) == pytest.approx(CIDER, abs=1e-12)


def test_a_clipped_count_and_a_brevity_penalty_by_hand() -> None:
    # "the" counts twice at most, once per place in the reference that has most of it.
    one, *_ = bleu([["the", "the", "the", "the"]], [[["the", "cat", "the", "dog"], ["the"]]])
    assert one == pytest.approx(2 / 4)
    # 2 of 2 words, against 4: exp(1 - 4 / 2).
    one, two, *_ = bleu([["a", "b"]], [[["a", "b", "c", "d"]]])
    assert (one, two) == pytest.approx((0.36787944117, 0.36787944117))


def test_the_reference_length_is_the_closest_and_of_two_the_shorter() -> None:
    # 3 words against 2 and 4: 2 it is, and nothing is lost for brevity.
    one, *_ = bleu([["a", "b", "c"]], [[["a", "b"], ["a", "b", "c", "d"]]])
    assert one == pytest.approx(1.0)


def test_rouge_l_by_hand() -> None:
    # The longest common subsequence is a c e: precision 3/4, recall 3/5, beta 1.2.
    score = rouge_l([["a", "x", "c", "e"]], [[["a", "b", "c", "d", "e"]]])[0]
    assert score == pytest.approx(2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75))


def test_equal_captions_score_best_and_nothing_in_common_nothing() -> None:
    captions = ["a red square on a hill", "one small ring by the sea", "two crosses"]
    best = caption_scores(captions, [[caption] for caption in captions])
    assert best.bleu == pytest.approx((1, 1, 1, 1))
    assert best.rouge_l == pytest.approx(1)
    # "two crosses" has no 3-gram: 2 of its 4 cosines are 0.
    assert best.cider == pytest.approx((10 + 10 + 5) / 3)
    assert best.meteor is None
    worst = caption_scores(["x y z"] * 3, [[caption] for caption in captions])
    assert worst.bleu == pytest.approx((0, 0, 0, 0), abs=1e-4)
    assert (worst.rouge_l, worst.cider) == (0, 0)


def test_captions_are_compared_by_their_words() -> None:
    scores = caption_scores(["A man can't ride."], [["a man can n't ride", "a man ca n't ride !"]])
    assert scores.bleu == pytest.approx((1, 1, 1, 1))


def test_an_empty_caption_scores_nothing() -> None:
    for scores in (
        caption_scores(["", "a b"], [["a dog"], ["a b"]]),
        caption_scores(["", ""], [["a dog"], ["a cat"]]),
    ):
        assert 0 <= scores.bleu[0] < 1
        assert 0 <= scores.rouge_l <= 0.5
    assert caption_scores([""], [["a dog"]]).bleu == (0, 0, 0, 0)


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider, caption_scores])
def test_lists_that_do_not_belong_together_are_refused(metric) -> None:
    for hypotheses, references, message in [
        (["a"], [], "1 captions, and references of 0"),
        ([], [], "no caption"),
        (["a", "b"], [["a"], []], "example 1 has no reference"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(hypotheses, references)
