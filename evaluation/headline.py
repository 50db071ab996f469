"""The numbers that git compares, and the few of them that `dvc exp show` has columns for."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.results import Result

MAIN = (
    "oracle_attributes", "clip_similarity", "fid", "recall_at_1", "macro_f1", "bleu_4", "meteor",
    "vqa_accuracy", "right_choice", "words_kept", "changed_attribute",
)  # fmt: skip
PICTURES = ("oracle_attributes", "clip_similarity")
COLUMNS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("caption", "captions", "gill", PICTURES),
    ("story", "story_5", "gill", PICTURES),
    ("+pics", "story_5_pictures", "gill", PICTURES),
    ("dialog", "dialogue_10", "gill", PICTURES),
    ("r1", "all_scenes", "gill", ("recall_at_1",)),
    ("f1", "decision", "linear", ("macro_f1",)),
    ("bleu", "coco_captioning", "gill", ("bleu_4",)),
    ("vqa", "vqa", "gill", ("vqa_accuracy",)),
    ("choice", "turns", "gill", ("right_choice",)),
    ("words", "own_words", "gill", ("words_kept",)),
)
"""Column, set, method, and which metric: the first that there is."""


def headline_results(results: Sequence[Result]) -> dict[str, Result]:
    """Column -> the result that stands in it, without those that were not measured."""
    measured = {(row.set, row.method, row.metric): row for row in results if row.value is not None}
    chosen = {}
    for column, set_, method, metrics in COLUMNS:
        rows = [measured[key] for m in metrics if (key := (set_, method, m)) in measured]
        if rows:
            chosen[column] = rows[0]
    return chosen


def headline(results: Sequence[Result]) -> dict[str, float]:
    """Column -> value, without those that were not measured."""
    return {
        column: round(row.value, 3)
        for column, row in headline_results(results).items()
        if row.value is not None
    }


def of_every_set(results: Sequence[Result]) -> dict[str, float]:
    """SET.METHOD -> the first of `MAIN` that there is."""
    short: dict[str, float] = {}
    for metric in MAIN:
        for row in results:
            if row.metric == metric and row.value is not None:
                short.setdefault(f"{row.set}.{row.method}", round(row.value, 4))
    return short
