"""BLEU, ROUGE-L and CIDEr against published numbers and the recorded ones of coco-caption."""

import json
import sys
from pathlib import Path
from statistics import fmean

import pytest

from evaluation.metrics.basic import MetricUnavailable
from evaluation.metrics.text import caption_scores

pytest.importorskip("pycocoevalcap", reason="pip install 'gill[captions]'")

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


@pytest.fixture(scope="module")
def published(shared_data: Path) -> dict:
    return json.loads((shared_data / "nlgeval_examples/expected_scores.json").read_text())


def test_corpus_scores_are_the_published_ones(published: dict, shared_data: Path) -> None:
    folder = shared_data / "nlgeval_examples"
    hypotheses, first, second = (
        (folder / name).read_text().splitlines() for name in ("hyp.txt", "ref1.txt", "ref2.txt")
    )
    scores = caption_scores(hypotheses, [list(pair) for pair in zip(first, second, strict=True)])
    expected = published["examples (hyp.txt vs ref1.txt, ref2.txt)"]
    for n, score in enumerate(scores.bleu, start=1):
        assert score == pytest.approx(expected[f"Bleu_{n}"], abs=5e-7)
    assert fmean(scores.rouge_l) == pytest.approx(expected["ROUGE_L"], abs=5e-7)
    assert fmean(scores.cider) == pytest.approx(expected["CIDEr"], abs=5e-7)


def test_sentence_scores_are_the_published_ones(published: dict) -> None:
    checked = 0
    for case in published["single"]:
        found = caption_scores([case["hyp"]], [case["refs"]])
        scores = {f"Bleu_{n}": score for n, score in enumerate(found.bleu, start=1)}
        scores |= {"ROUGE_L": found.rouge_l[0], "CIDEr": found.cider[0]}
        for name in scores.keys() & case.keys():
            assert scores[name] == pytest.approx(case[name], abs=1e-6), (case["hyp"], name)
            checked += 1
    assert checked == 15


def test_scores_are_those_of_the_coco_evaluation(capsys: pytest.CaptureFixture) -> None:
    scores = caption_scores(HYPOTHESES, REFERENCES)
    assert scores.bleu == pytest.approx(BLEU, abs=1e-12)
    assert scores.rouge_l == pytest.approx(ROUGE_L, abs=1e-12)
    assert scores.cider == pytest.approx(CIDER, abs=1e-12)
    assert capsys.readouterr().out == ""


def test_equal_captions_score_best_and_nothing_in_common_nothing() -> None:
    captions = ["a red square on a hill", "one small ring by the sea", "two crosses"]
    best = caption_scores(captions, [[caption] for caption in captions])
    assert best.bleu == pytest.approx([1, 1, 1, 1])
    assert best.rouge_l == pytest.approx([1, 1, 1])
    # "two crosses" has no 3-gram: 2 of its 4 cosines are 0.
    assert best.cider == pytest.approx([10, 10, 5])
    worst = caption_scores(["x y z"] * 3, [[caption] for caption in captions])
    assert worst.bleu == pytest.approx([0, 0, 0, 0], abs=1e-4)
    assert (worst.rouge_l, worst.cider) == ([0, 0, 0], [0, 0, 0])


def test_an_empty_caption_scores_nothing() -> None:
    scores = caption_scores(["", "a b"], [["a dog"], ["a b"]])
    # 2 words against 4: exp(1 - 4 / 2).
    assert scores.bleu[:2] == pytest.approx([0.36787944117, 0.36787944117])
    assert scores.rouge_l == [0, 1]
    assert caption_scores([""], [["a dog"]]).bleu == [0, 0, 0, 0]


def test_without_its_library_the_metrics_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(MetricUnavailable, match=r"need pycocoevalcap: .*'gill\[captions\]'"):
        caption_scores(["a"], [["a"]])


def test_lists_that_do_not_belong_together_are_refused() -> None:
    for hypotheses, references, message in [
        (["a"], [], "1 sentences, and references of 0"),
        ([], [], "no sentence"),
        (["a", "b"], [["a"], []], "sentence 1 has no reference"),
    ]:
        with pytest.raises(ValueError, match=message):
            caption_scores(hypotheses, references)
