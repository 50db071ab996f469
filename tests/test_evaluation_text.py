"""Captions as written, scored by their words."""

import importlib.util
import sys

import pytest

from evaluation.texts import score_captions

METRICS = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}


def test_captions_are_compared_by_their_words_and_without_tables_meteor_is_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pycocoevalcap", reason="pip install 'gill[captions]'")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = score_captions(
        ["A man can't ride.", "Two dogs!"],
        [["a man can n't ride", "a man ca n't ride !"], ["two DOGS", "three cats"]],
    )
    assert {name: found.whole[name] for name in METRICS & set(found.whole)} == pytest.approx(
        {"bleu_1": 1, "bleu_2": 1, "bleu_3": 1, "bleu_4": 1}
    )
    assert found.values["rouge_l"] == pytest.approx([1, 1])
    assert all(score > 1 for score in found.values["cider"])
    assert set(found.absent) == {"meteor"}


def test_without_the_extra_every_metric_is_absent_and_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    found = score_captions(["a dog"], [["a dog"]])
    assert (found.values, found.whole) == ({}, {})
    assert set(found.absent) == METRICS | {"meteor"}
    assert all("pip install 'gill[captions]'" in why for why in found.absent.values())
