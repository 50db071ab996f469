"""METEOR 1.5 for English without Java: the reference implementation's numbers, quirks included.

Denkowski and Lavie 2014, "Meteor Universal: Language Specific Translation Evaluation for Any Target
Language", section 2, with the parameters and weights tuned for ranking, as the COCO evaluation runs
it. Two sentences are aligned by words (equal, of one stem, of a common synonym set) and by phrases
(paraphrases); the score is a weighted harmonic mean of precision and recall, less a penalty for
fragmentation.

The tables that it needs are published with the reference implementation and are no part of this
project: see `evaluation.metrics.meteor_resources`. Without them METEOR is absent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum
from pathlib import Path
from typing import NamedTuple

from evaluation.metrics.meteor_resources import MAX_PHRASE, MeteorResources
from evaluation.metrics.text import check_references

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
BEAM = 40
EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
WEIGHTS = (1.0, 0.6, 0.8, 0.6)
"""Of a match in the score, by kind. The search for an alignment has its own: `_Match.worth`."""

HYPOTHESIS, REFERENCE = 0, 1
"""Positions in a pair."""

Words = Sequence[str]
Paraphrases = dict[tuple[str, ...], list[tuple[str, ...]]]


class MeteorScores(NamedTuple):
    """Between 0 and 1. The corpus is scored on summed counts: it is not the examples' mean."""

    corpus: float
    examples: list[float]


class Meteor:
    """METEOR with its tables, which are read once.

    Args:
        folder: holds `meteor-1.5.jar` and `data/paraphrase-en.gz`; by default the one inside the
            installed `pycocoevalcap`.

    Raises:
        MetricUnavailable: a table or the stemmer is missing; says which, and how to get it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.resources = MeteorResources(folder)

    def score(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> MeteorScores:
        """Score each sentence by its best reference, and the corpus.

        For captions, give Penn Treebank words without punctuation, joined by spaces, as the COCO
        evaluation does: `evaluation.metrics.penn_treebank`. Each call reads the whole
        paraphrase table once, some seconds: score a corpus in one call.

        Raises:
            ValueError: no sentence, one without reference, or lists of different length.
        """
        check_references(hypotheses, references)
        ours = [self.resources.words(line) for line in hypotheses]
        theirs = [[self.resources.words(line) for line in group] for group in references]
        paraphrases = self.resources.paraphrases(
            [*ours, *(words for group in theirs for words in group)]
        )
        best = [
            max((self._count(words, other, paraphrases) for other in group), key=_Counts.score)
            for words, group in zip(ours, theirs, strict=True)
        ]
        return MeteorScores(_sum(best).score(), [counts.score() for counts in best])

    def _count(self, hypothesis: Words, reference: Words, paraphrases: Paraphrases) -> _Counts:
        matches = self._matches(hypothesis, reference, paraphrases)
        chosen = _best_alignment(matches, len(reference))

        def weigh(words: Words) -> float:
            functional = self.resources.function_words
            return fsum(1 - DELTA if word in functional else DELTA for word in words)

        def matched(side: int) -> float:
            words = hypothesis if side == HYPOTHESIS else reference
            return fsum(
                WEIGHTS[match.kind] * weigh([words[i] for i in match.spans[side]])
                for match in chosen
            )

        covered = [sum(len(match.spans[side]) for match in chosen) for side in (0, 1)]
        chunks = _chunks(chosen)
        return _Counts(
            lengths=(weigh(hypothesis), weigh(reference)),
            matched=(matched(HYPOTHESIS), matched(REFERENCE)),
            covered=sum(covered),
            # A sentence matched whole, in order, is not fragmented at all.
            chunks=0 if chunks == 1 and covered == [len(hypothesis), len(reference)] else chunks,
        )

    def _matches(
        self, hypothesis: Words, reference: Words, paraphrases: Paraphrases
    ) -> list[_Match]:
        """Every possible match; their order breaks ties, and is the reference implementation's."""
        matches = list(_word_matches(EXACT, hypothesis, reference, str.__eq__))
        if hypothesis == reference:
            # Other kinds of match could only mislead the search.
            return matches
        stem, meanings = self.resources.stem, self.resources.meanings

        def same_stem(a: str, b: str) -> bool:
            return a != b and stem(a) == stem(b)

        def synonyms(a: str, b: str) -> bool:
            return a != b and not meanings(a).isdisjoint(meanings(b))

        matches += _word_matches(STEM, hypothesis, reference, same_stem)
        matches += _word_matches(SYNONYM, hypothesis, reference, synonyms)
        for there, here in _phrase_pairs(reference, hypothesis, paraphrases):
            matches.append(_Match(PARAPHRASE, here, there))
        for here, there in _phrase_pairs(hypothesis, reference, paraphrases):
            matches.append(_Match(PARAPHRASE, here, there))
        return matches


@dataclass(frozen=True)
class _Counts:
    """What a score is made of. Pairs are (hypothesis, reference)."""

    lengths: tuple[float, float]
    """In words, a content word counting delta and a function word 1 - delta."""
    matched: tuple[float, float]
    """The same of matched words, times the weight of the match."""
    covered: int
    """Matched words of both sides."""
    chunks: int
    """Runs of matches that are contiguous and in one order on both sides."""

    def score(self) -> float:
        if 0 in self.lengths or 0 in self.matched:
            return 0.0
        precision, recall = (m / n for m, n in zip(self.matched, self.lengths, strict=True))
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        # Chunks per matched word, of both sides on average.
        fragmentation = self.chunks / (self.covered / 2)
        return max(0.0, mean * (1 - GAMMA * fragmentation**BETA))


def _sum(parts: Sequence[_Counts]) -> _Counts:
    return _Counts(
        lengths=(fsum(part.lengths[0] for part in parts), fsum(part.lengths[1] for part in parts)),
        matched=(fsum(part.matched[0] for part in parts), fsum(part.matched[1] for part in parts)),
        covered=sum(part.covered for part in parts),
        chunks=sum(part.chunks for part in parts),
    )


class _Match(NamedTuple):
    """Words of the hypothesis that match words of the reference."""

    kind: int
    hypothesis: range
    reference: range

    @property
    def worth(self) -> int:
        """What it adds in the search: all of an exact match, else half of each side, rounded down.

        So a single stem or synonym adds nothing. It is taken where it has no rival, or where it
        saves a chunk.
        """
        whole = self.kind == EXACT
        return sum(len(span) if whole else len(span) // 2 for span in self.spans)

    @property
    def spans(self) -> tuple[range, range]:
        return self.hypothesis, self.reference


def _word_matches(
    kind: int, hypothesis: Words, reference: Words, match: Callable[[str, str], bool]
) -> Iterator[_Match]:
    for j, theirs in enumerate(reference):
        for i, ours in enumerate(hypothesis):
            if match(ours, theirs):
                yield _Match(kind, range(i, i + 1), range(j, j + 1))


def _phrase_pairs(
    source: Words, target: Words, paraphrases: Paraphrases
) -> Iterator[tuple[range, range]]:
    """Each phrase of `source` with each place in `target` where a paraphrase of it stands."""
    for start in range(len(source)):
        for end in range(start + 1, min(start + MAX_PHRASE, len(source)) + 1):
            for phrase in paraphrases.get(tuple(source[start:end]), ()):
                for at in range(len(target) - len(phrase) + 1):
                    if tuple(target[at : at + len(phrase)]) == phrase:
                        yield range(start, end), range(at, at + len(phrase))


class _Path(NamedTuple):
    """An alignment up to some word of the reference."""

    worth: int = 0
    chunks: int = 0
    distance: int = 0
    resume: int = 0
    """The first word of the reference that is not decided."""
    run_end: int | None = None
    """Where in the hypothesis the chunk that is still open would go on."""
    used: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    chosen: tuple[_Match, ...] = ()

    def rank(self) -> tuple[int, int, int]:
        """Most words, then fewest chunks, then shortest distance."""
        return -self.worth, self.chunks, self.distance

    def take(self, match: _Match, distance: int) -> _Path:
        # A chunk is counted when it ends: here, where the match is not the next word.
        new_chunk = self.run_end is not None and self.run_end != match.hypothesis.start
        return _Path(
            worth=self.worth + match.worth,
            chunks=self.chunks + new_chunk,
            distance=distance,
            resume=match.reference.stop,
            run_end=match.hypothesis.stop,
            used=(self.used[0] | {*match.hypothesis}, self.used[1] | {*match.reference}),
            chosen=(*self.chosen, match),
        )

    def skip(self, distance: int) -> _Path:
        # A word of the reference without a match ends the chunk on that side.
        closed = self.close()
        return closed._replace(distance=distance, resume=self.resume + 1)

    def close(self) -> _Path:
        return self._replace(chunks=self.chunks + (self.run_end is not None), run_end=None)

    def free(self, match: _Match) -> bool:
        return all(used.isdisjoint(span) for used, span in zip(self.used, match.spans))


def _best_alignment(matches: Sequence[_Match], reference_length: int) -> tuple[_Match, ...]:
    """Matches that do not overlap: a beam search from left to right over the reference.

    Matches without a rival are settled first.
    """
    # Matches by the word of the reference they start at, and how many matches want each word.
    starting: list[list[_Match]] = [[] for _ in range(reference_length)]
    coverage: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for match in matches:
        starting[match.reference.start].append(match)
        for count, span in zip(coverage, match.spans):
            count.update(span)
    # Without a rival: no other match wants one of its words, on either side.
    settled = {
        match.reference.start: match
        for match in matches
        if len(starting[match.reference.start]) == 1
        and all(count[i] == 1 for count, span in zip(coverage, match.spans) for i in span)
    }
    used = (
        frozenset(i for match in settled.values() for i in match.hypothesis),
        frozenset(j for match in settled.values() for j in match.reference),
    )
    # Every path decides the same word of the reference in the same round. Words under a longer
    # match are decided with it, and the path waits until the others have come as far.
    paths = [_Path(used=used)]
    for position in range(reference_length):
        extended: list[_Path] = []
        # A stable sort: of equal paths those that were found first stay, as in the reference.
        for path in sorted(paths, key=_Path.rank)[:BEAM]:
            if position < path.resume:
                extended.append(path)
            elif position in settled:
                match = settled[position]
                extended.append(path.take(match, path.distance + _distance(match)))
            else:
                # The reference implementation charges a match's distance to its rivals that
                # come after it, not to itself. It breaks ties, so it is kept.
                distance = path.distance
                for match in filter(path.free, starting[position]):
                    extended.append(path.take(match, distance))
                    distance += _distance(match)
                extended.append(path.skip(distance))
        paths = extended
    finished = [path.close() for path in sorted(paths, key=_Path.rank)[:BEAM]]
    return min(finished, key=_Path.rank).chosen


def _distance(match: _Match) -> int:
    return abs(match.reference.start - match.hypothesis.start)


def _chunks(chosen: Sequence[_Match]) -> int:
    """Runs of matches that follow each other without a gap on both sides."""
    joins = sum(
        before.hypothesis.stop == after.hypothesis.start
        and before.reference.stop == after.reference.start
        for before, after in pairwise(chosen)
    )
    return len(chosen) - joins
