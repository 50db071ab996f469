"""The six findings of the paper as claims about differences, with the rule that judges them.

Written before any result of the five-seed run was looked at. What decides a finding is the paper's
own protocol for it; what stands `beside` is shown with its own verdict and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.cell_scores import Term
from evaluation.metrics.paired import Claim
from evaluation.published import published
from evaluation.variants import BASELINE

JUDGES = ("oracle_attributes", "clip_similarity")
# A smaller difference counts as none: a quarter of one of the oracle's five attributes; of CLIP
# similarity a little more than what the paper calls comparable (0.592 and 0.581, section 4.1).
MARGINS = {
    "oracle_attributes": 0.05,
    "clip_similarity": 0.02,
    "recall_at_1": 0.02,
    "recall_at_5": 0.02,
    "recall_at_10": 0.02,
    "macro_f1": 0.05,
}
RULE = (
    "Every finding is a set of claims about a paired difference, first minus second, on the same "
    "examples with the same seeds. Its 95% interval is a bootstrap over seeds and examples at "
    "once (for recall and macro F1, of which a run has one number, Student's t over seeds). "
    '"Better" is seen when the interval lies above 0, "equal or better" when it lies above '
    "-margin; both are reversed when it lies below 0 and reaches -margin. "
    '"Equal" is seen when the interval lies within the margin, reversed when outside. Otherwise: '
    "not seen. "
    "Margins: 0.05 of the oracle's share of right attributes, 0.02 of CLIP similarity, 0.02 of "
    "recall, 0.05 of macro F1. A finding is seen when all deciding claims are, reversed when one "
    "is. The rule was fixed before the results were looked at."
)


@dataclass(frozen=True)
class Part:
    """One claim: the sum of `first` against the sum of `second` (0 where there is none)."""

    title: str
    claim: Claim
    first: tuple[Term, ...]
    second: tuple[Term, ...] = ()
    paper: str = ""
    """The paper's own two numbers, where it prints them."""
    beside: bool = False
    metrics: tuple[str, ...] = JUDGES


@dataclass(frozen=True)
class Finding:
    """A statement of the paper and the claims that decide it."""

    number: int
    statement: str
    source: str
    parts: tuple[Part, ...]


def _term(variant: str, set_: str, method: str = "gill") -> tuple[Term, ...]:
    return (Term(variant, set_, method),)


def _paper(*keys: tuple[str, str, str, str]) -> str:
    """Printed numbers, as "0.592 / 0.581"; (table, set, method, metric) each."""
    values = [published(*key) for key in keys]
    if any(value is None for value in values):
        return ""
    names = {"clip_similarity": "CLIP", "fid": "FID", "macro_f1": "F1"}
    metric = names.get(keys[0][3], keys[0][3].replace("recall_at_", "R@"))
    return f"{metric} {' / '.join(f'{value:g}' for value in values)}"


def _methods(
    claim: Claim, better: str, set_: str, title: str, table: str, beside: bool = False
) -> Part:
    """GILL and the generator alone on one set."""
    worse = "gill" if better == "generator" else "generator"
    names = {"gill": "GILL", "generator": "generator alone"}
    return Part(
        f"{title}: {names[better]} against {names[worse]}",
        claim,
        _term(BASELINE, set_, better),
        _term(BASELINE, set_, worse),
        _paper(*((table, set_, m, "clip_similarity") for m in (better, worse))),
        beside,
    )


def _variants(
    claim: Claim, first: str, second: str, set_: str, title: str, paper: str, beside: bool = False
) -> Part:
    return Part(title, claim, _term(first, set_), _term(second, set_), paper, beside)


def _slope(method: str, first: int, last: int) -> tuple[Term, ...]:
    """Gain per dialogue round, by least squares over rounds `first` to `last`."""
    rounds = np.arange(first, last + 1)
    centred = rounds - rounds.mean()
    weights = centred / (centred**2).sum()
    return tuple(
        Term(BASELINE, f"dialogue_{n}", method, float(w))
        for n, w in zip(rounds, weights, strict=True)
    )


def _rounds(claim: Claim, method: str, more: int, fewer: int, title: str) -> Part:
    paper = [("table_2", f"dialogue_{n}", method, "clip_similarity") for n in (more, fewer)]
    return Part(
        title,
        claim,
        _term(BASELINE, f"dialogue_{more}", method),
        _term(BASELINE, f"dialogue_{fewer}", method),
        _paper(*paper),
    )


def _pictures(captions: int, against: int, title: str, beside: bool = False) -> Part:
    """Stories with their preceding pictures against captions alone."""
    sets = (f"story_{captions}_pictures", f"story_{against}")
    paper = _paper(*(("table_1", name, "gill", "clip_similarity") for name in sets))
    return Part(title, "greater", _term(BASELINE, sets[0]), _term(BASELINE, sets[1]), paper, beside)


def _mapper(other: str, name: str, set_: str, beside: bool) -> Part:
    paper = _paper(*(("table_3", set_, m, "clip_similarity") for m in ("gill", other)))
    where = {"story_5_pictures": "stories", "story_5": "stories, captions alone"}[set_]
    title = f"{where}: GILLMapper against {name}"
    return _variants("greater", BASELINE, other, set_, title, paper, beside)


def _tokens(claim: Claim, more: str, fewer: str, set_: str, beside: bool = False) -> Part:
    metric = "fid" if set_ == "captions" else "clip_similarity"
    numbers = {"r1": "r=1", "r2": "r=2", "r4": "r=4", BASELINE: "r=8"}
    paper = _paper(*(("table_4", set_, v, metric) for v in (more, fewer)))
    where = "captions" if set_ == "captions" else "stories"
    title = f"{where}: {numbers[more]} against {numbers[fewer]}"
    return _variants(claim, more, fewer, set_, title, paper, beside)


def _recall(k: int) -> Part:
    metric, set_ = f"recall_at_{k}", "story_5_pictures"
    return Part(
        f"R@{k}: GILL with the whole story against CLIP with the last caption",
        "greater",
        _term(BASELINE, set_, "gill"),
        _term(BASELINE, set_, "clip"),
        _paper(*(("table_5", set_, method, metric) for method in ("gill", "clip"))),
        metrics=(metric,),
    )


def _decision(claim: Claim, other: str, name: str) -> Part:
    return Part(
        f"linear classifier against {name}",
        claim,
        _term(BASELINE, "decision", "linear"),
        _term(BASELINE, "decision", other),
        _paper(*(("table_6", "decision", method, "macro_f1") for method in ("linear", other))),
        metrics=("macro_f1",),
    )


def _without_retrieval(set_: str, title: str, beside: bool) -> Part:
    keys = [("section_5", set_, m, "clip_similarity") for m in ("generation_only", "gill")]
    return _variants("equal", "generation_only", BASELINE, set_, title, _paper(*keys), beside)


FINDINGS = (
    Finding(
        1,
        "With one caption the generator's own text encoder is equal or better; with five captions, "
        "or ten dialogue rounds, GILL is better",
        "Tables 1, 2",
        (
            _methods("at_least", "generator", "story_1", "a story's last caption", "table_1"),
            _methods("greater", "gill", "story_5", "a story's five captions", "table_1"),
            _methods("greater", "gill", "dialogue_10", "ten rounds", "table_2"),
            _methods(
                "at_least", "generator", "captions", "one complete caption", "captions", beside=True
            ),
            _methods("at_least", "generator", "dialogue_1", "one round", "table_2", beside=True),
        ),
    ),
    Finding(
        2,
        "GILL gains from every added dialogue round while the generator alone levels off; and it "
        "gains from preceding pictures",
        "Figure 8, Table 1, Figure 6",
        (
            Part("GILL: gain per round, rounds 1 to 10", "greater", _slope("gill", 1, 10)),
            _rounds("greater", "gill", 10, 6, "GILL: ten rounds against six"),
            *(
                _rounds("at_least", "gill", n + 1, n, f"GILL: round {n + 1} costs nothing")
                for n in range(1, 10)
            ),
            _rounds("equal", "generator", 10, 6, "generator alone: ten rounds are like six"),
            _pictures(5, 5, "GILL: five captions and four pictures against five captions"),
            _pictures(2, 5, "GILL: two captions and one picture against five captions"),
            *(
                _pictures(n, n, f"GILL: {n} captions with against without pictures", beside=True)
                for n in range(2, 5)
            ),
        ),
    ),
    Finding(
        3,
        "GILLMapper beats the linear and the MLP mapping on stories; more [IMG] tokens do not "
        "hurt, and 4 to 8 are better than 1 on captions",
        "Tables 3, 4",
        (
            *(
                _mapper(other, name, set_, set_ == "story_5" or other == "encoder")
                for set_ in ("story_5_pictures", "story_5")
                for other, name in (
                    ("linear", "linear"),
                    ("mlp", "MLP"),
                    ("encoder", "transformer encoder"),
                )
            ),
            *(
                _tokens("at_least", more, fewer, "captions")
                for more, fewer in (("r2", "r1"), ("r4", "r2"), (BASELINE, "r4"))
            ),
            *(_tokens("greater", more, "r1", "captions") for more in ("r4", BASELINE)),
            *(
                _tokens("at_least", more, fewer, "story_5_pictures", beside=True)
                for more, fewer in (("r2", "r1"), ("r4", "r2"), (BASELINE, "r4"))
            ),
        ),
    ),
    Finding(
        4,
        "Contextual retrieval beats CLIP retrieval by the last caption",
        "Table 5",
        tuple(_recall(k) for k in (1, 5, 10)),
    ),
    Finding(
        5,
        "The linear decision beats its baselines (against the similarity heuristic the paper calls "
        "it comparable)",
        "Table 6",
        (
            _decision("greater", "always_retrieve", "always retrieve"),
            _decision("greater", "always_generate", "always generate"),
            _decision("greater", "random", "random"),
            _decision("at_least", "heuristic", "similarity threshold"),
        ),
    ),
    Finding(
        6,
        "Dropping the retrieval loss does not change generation",
        "Section 5",
        (
            _without_retrieval("story_5_pictures", "stories with pictures", False),
            _without_retrieval("story_5", "stories, captions alone", True),
            _without_retrieval("captions", "one caption", True),
        ),
    ),
)
