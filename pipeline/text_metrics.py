"""BLEU, ROUGE-L and CIDEr of captions, counted as the COCO caption evaluation counts them.

Chen et al. 2015, "Microsoft COCO Captions: Data Collection and Evaluation Server". Appendix E.1 of
the paper reports BLEU-4 and METEOR on COCO and does not name an implementation; METEOR is in
`pipeline.meteor`. Sentences are lists of words: `pipeline.penn_treebank` makes them.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.meteor import Meteor
from pipeline.penn_treebank import treebank_words

Words = Sequence[str]
Ngram = tuple[str, ...]

MAX_N = 4
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2


@dataclass(frozen=True)
class CaptionScores:
    """Scores over a corpus, between 0 and 1 but for CIDEr, which is between 0 and 10.

    The tables print BLEU and METEOR as here; much of the literature multiplies all by 100.
    """

    bleu: tuple[float, float, float, float]
    """BLEU-1 to BLEU-4."""
    rouge_l: float
    cider: float
    meteor: float | None
    """None where no `Meteor` was given."""


def caption_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], meteor: Meteor | None = None
) -> CaptionScores:
    """Scores of generated captions, one per picture, against the people's captions of each.

    Args:
        hypotheses: captions as written, one per picture.
        references: all captions of each picture, as written.
        meteor: what to score METEOR with; see `Meteor` for why it may not be had.

    Raises:
        ValueError: no picture, a picture without reference, or lists of different length.
    """
    written = [treebank_words(caption) for caption in hypotheses]
    real = [[treebank_words(caption) for caption in group] for group in references]
    return CaptionScores(
        bleu=bleu(written, real),
        rouge_l=fmean(rouge_l(written, real)),
        cider=fmean(cider(written, real)),
        meteor=None
        if meteor is None
        else meteor.score(
            [" ".join(words) for words in written],
            [[" ".join(words) for words in group] for group in real],
        ).corpus,
    )


def bleu(
    hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of the corpus (Papineni et al. 2002).

    Clipped n-gram counts and lengths are summed over the corpus before they are divided; the
    reference length is the one closest to the hypothesis, the shorter of two as close. As in the
    COCO evaluation, 1e-15 is added to what is counted and 1e-9 to what it is divided by, so that
    a corpus without a common 4-gram has a BLEU-4 just above 0.

    Raises:
        ValueError: as `caption_scores`.
    """
    _check(hypotheses, references)
    matched, offered = [0] * MAX_N, [0] * MAX_N
    length = reference_length = 0
    for words, group in zip(hypotheses, references, strict=True):
        length += len(words)
        reference_length += min(
            (len(other) for other in group), key=lambda size: (abs(size - len(words)), size)
        )
        for n in range(1, MAX_N + 1):
            most: Counter[Ngram] = Counter()
            for other in group:
                most |= _ngrams(other, n)
            matched[n - 1] += (_ngrams(words, n) & most).total()
            offered[n - 1] += max(0, len(words) - n + 1)

    ratio = (length + 1e-15) / (reference_length + 1e-9)
    brevity = 1.0 if ratio >= 1 else math.exp(1 - 1 / ratio)
    precisions = [(m + 1e-15) / (o + 1e-9) for m, o in zip(matched, offered, strict=True)]
    one, two, three, four = (
        brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, MAX_N + 1)
    )
    return one, two, three, four


def rouge_l(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """ROUGE-L of each example (Lin 2004, equation 2 to 4, with beta 1.2); the corpus has the mean.

    As in the COCO evaluation, precision and recall are each the best over the references, not
    necessarily of the same one.

    Raises:
        ValueError: as `caption_scores`.
    """
    _check(hypotheses, references)
    scores = []
    for words, group in zip(hypotheses, references, strict=True):
        common = [_longest_common_subsequence(words, other) for other in group]
        precision = max(common) / len(words) if words else 0.0
        recall = max(c / len(other) if other else 0.0 for c, other in zip(common, group))
        weighted = recall + ROUGE_BETA**2 * precision
        scores.append((1 + ROUGE_BETA**2) * precision * recall / weighted if weighted else 0.0)
    return scores


def cider(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr of each example, 0 to 10; the corpus has the mean.

    What the COCO evaluation calls CIDEr is CIDEr-D (Vedantam et al. 2015, section 6) without
    stemming: cosine of clipped tf-idf vectors, with a Gaussian penalty (sigma 6) on the difference
    of lengths, averaged over n = 1 to 4 and over the references. Document frequencies come from the
    references given, so the score depends on the whole corpus, and one example alone has 0.

    Raises:
        ValueError: as `caption_scores`.
    """
    _check(hypotheses, references)
    document_frequency: Counter[Ngram] = Counter()
    for group in references:
        document_frequency.update(
            {gram for other in group for n in range(1, MAX_N + 1) for gram in _ngrams(other, n)}
        )
    examples = math.log(len(references))

    def tf_idf(words: Words, n: int) -> dict[Ngram, float]:
        return {
            gram: count * (examples - math.log(max(1, document_frequency[gram])))
            for gram, count in _ngrams(words, n).items()
        }

    scores = []
    for words, group in zip(hypotheses, references, strict=True):
        ours = [tf_idf(words, n) for n in range(1, MAX_N + 1)]
        total = 0.0
        for other in group:
            penalty = math.exp(-((_bigrams(words) - _bigrams(other)) ** 2) / (2 * CIDER_SIGMA**2))
            theirs = [tf_idf(other, n) for n in range(1, MAX_N + 1)]
            total += penalty * fmean(map(_clipped_cosine, ours, theirs))
        scores.append(10 * total / len(group))
    return scores


def _bigrams(words: Words) -> int:
    """The length of a sentence, to the COCO evaluation's CIDEr."""
    return max(0, len(words) - 1)


def _clipped_cosine(ours: dict[Ngram, float], theirs: dict[Ngram, float]) -> float:
    product = sum(
        min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs
    )
    lengths = math.hypot(*ours.values()) * math.hypot(*theirs.values())
    return product / lengths if lengths else 0.0


def _ngrams(words: Words, n: int) -> Counter[Ngram]:
    return Counter(zip(*(words[i:] for i in range(n))))


def _longest_common_subsequence(a: Words, b: Words) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _check(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} captions, and references of {len(references)}")
    if not hypotheses:
        raise ValueError("no caption to score")
    for row, group in enumerate(references):
        if not group:
            raise ValueError(f"example {row} has no reference")
