"""BLEU, ROUGE-L and CIDEr of captions, counted by the COCO caption evaluation's own code.

Chen et al. 2015, "Microsoft COCO Captions: Data Collection and Evaluation Server". Appendix E.1 of
the paper reports BLEU-4 and METEOR on COCO and does not name an implementation. pycocoevalcap is
the evaluation server's code. What it leaves to Java is done here without: `penn_treebank` makes the
words, `meteor` counts METEOR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from evaluation.metrics.basic import MetricUnavailable
from gill_errors import InputError

CAPTIONS_EXTRA = "install the 'captions' extra: pip install 'gill[captions]'"


class CaptionScores(NamedTuple):
    """Between 0 and 1 but for CIDEr, which is between 0 and 10. Literature often multiplies by 100.

    The corpus has no ROUGE-L and CIDEr of its own: the mean over the examples is reported.
    """

    bleu: list[float]
    """BLEU-1 to BLEU-4 of the corpus; of a corpus without a common n-gram just above 0."""
    rouge_l: list[float]
    """Of each example."""
    cider: list[float]
    """Of each example. Document frequencies come from all references given, so that a score depends
    on the whole corpus, and one example alone has 0."""


def caption_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores of generated captions, one per picture, against the people's captions of each.

    Args:
        hypotheses: words joined by single spaces, as `treebank_words` makes them.
        references: the same of all captions of each picture.

    Raises:
        MetricUnavailable: pycocoevalcap is not installed; says how to get it.
        ValueError: no sentence, one without reference, or lists of different length.
    """
    check_references(hypotheses, references)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError:
        raise MetricUnavailable(
            f"BLEU, ROUGE-L and CIDEr need pycocoevalcap: {CAPTIONS_EXTRA}"
        ) from None
    # It takes dictionaries from a picture's id, here its row, to lists; a hypothesis is a list too.
    written = {row: [line] for row, line in enumerate(hypotheses)}
    real = {row: list(group) for row, group in enumerate(references)}
    # The corpus BLEU sums counts over the examples: it is no mean of theirs.
    of_corpus, _ = Bleu(4).compute_score(real, written, verbose=0)
    _, rouge_l = Rouge().compute_score(real, written)
    _, cider = Cider().compute_score(real, written)
    return CaptionScores(of_corpus, rouge_l.tolist(), cider.tolist())


def check_references(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises ValueError unless there are sentences, and each has a reference."""
    if len(hypotheses) != len(references):
        raise InputError(f"{len(hypotheses)} sentences, and references of {len(references)}")
    if not hypotheses:
        raise InputError("no sentence to score")
    for row, group in enumerate(references):
        if not group:
            raise InputError(f"sentence {row} has no reference")
