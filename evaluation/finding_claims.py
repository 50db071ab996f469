"""The findings of the paper as claims about differences; finding_claims.yaml makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BeforeValidator

from evaluation.cell_scores import Term
from evaluation.metrics.paired import Claim
from evaluation.published import published
from evaluation.variants import BASELINE
from gill_records import Record

JUDGES = ("oracle_attributes", "clip_similarity")


def _terms(written: str) -> tuple[Term, ...]:
    """`gill/story_5/generator` as one term; `gill/dialogue_*/gill` as the gain per round."""
    variant, set_, method = written.split("/")
    if not set_.endswith("*"):
        return (Term(variant, set_, method),)
    rounds = np.arange(1, 11)
    centred = rounds - rounds.mean()
    weights = centred / (centred**2).sum()
    return tuple(
        Term(variant, set_.replace("*", str(n)), method, float(weight))
        for n, weight in zip(rounds, weights, strict=True)
    )


class Part(Record):
    """One claim: the sum of `first` against the sum of `second` (0 where there is none)."""

    title: str
    claim: Claim
    first: Annotated[tuple[Term, ...], BeforeValidator(_terms)]
    second: Annotated[tuple[Term, ...], BeforeValidator(_terms)] = ()
    paper: str = ""
    beside: bool = False
    metrics: tuple[str, ...] = JUDGES

    @property
    def printed(self) -> str:
        """The paper's own two numbers, as "CLIP 0.592 / 0.581"; "" where it prints none."""
        if not self.paper:
            return ""
        table, metric = self.paper.split("/")
        # An ablation's own number goes by the name of its variant.
        values = [
            published(
                table, one.set, one.method if one.variant == BASELINE else one.variant, metric
            )
            for one in self.first + self.second
        ]
        names = {"clip_similarity": "CLIP", "fid": "FID", "macro_f1": "F1"}
        name = names.get(metric, metric.replace("recall_at_", "R@"))
        return f"{name} {' / '.join(f'{value:g}' for value in values)}"


class Finding(Record):
    """A statement of the paper and the claims that decide it."""

    number: int
    statement: str
    source: str
    parts: tuple[Part, ...]


class Findings(Record):
    """All of finding_claims.yaml."""

    rule: str
    margins: dict[str, float]
    findings: tuple[Finding, ...]


CLAIMED = Findings.model_validate(
    yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
)
