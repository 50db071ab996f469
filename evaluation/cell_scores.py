"""The numbers of all finished cells, side by side: one table [S seeds, N examples] per question."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from evaluation.results import Result, read_records, read_results
from evaluation.variants import Cell


@dataclass(frozen=True)
class Term:
    """What one variant's method scored on one set, times `weight`."""

    variant: str
    set: str
    method: str
    weight: float = 1.0


class CellScores:
    """Reads each cell's results.json and records.parquet when it is first asked for."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        """`cells`: finished ones."""
        self.cells = list(cells)
        self._by_key = {(one.name, one.seed): one for one in cells}

    def seeds(self, variants: Sequence[str]) -> list[int]:
        """Seeds with which every one of `variants` has finished."""
        found = [{s for name, s in self._by_key if name == variant} for variant in variants]
        return sorted(set.intersection(*found)) if found else []

    def record(self, variant: str, seed: int) -> dict[str, Any]:
        """What the cell says of itself: params, versions, seconds."""
        return json.loads(self._by_key[variant, seed].record.read_text(encoding="utf-8"))

    @functools.cache  # noqa: B019 - lives as long as the aggregation
    def results(self, variant: str, seed: int) -> list[Result]:
        """All numbers of one cell."""
        folder = self._by_key[variant, seed].artifacts.evaluation
        return read_results(folder / "results.json")

    @functools.cache  # noqa: B019
    def _examples(self, variant: str, seed: int) -> dict[tuple[str, str], dict[str, float]]:
        """(set, `METHOD.METRIC`) -> example id -> score."""
        scores: dict[tuple[str, str], dict[str, float]] = {}
        folder = self._by_key[variant, seed].artifacts.evaluation
        for record in read_records(folder / "records.parquet"):
            for name, value in record.scores.items():
                scores.setdefault((record.set, name), {})[record.id] = value
        return scores

    def per_example(
        self, terms: Sequence[Term], metric: str
    ) -> list[Float[np.ndarray, "S N"]] | None:
        """Each term's scores, on the seeds and examples that all terms have; None without any."""
        seeds = self.seeds([term.variant for term in terms])
        # Per term and seed a table from example to score; then the examples that are in all.
        found = [
            [self._examples(t.variant, s).get((t.set, f"{t.method}.{metric}"), {}) for s in seeds]
            for t in terms
        ]
        known = [set(scores) for of_term in found for scores in of_term]
        ids = sorted(set.intersection(*known)) if known else []
        if not ids:
            return None
        return [np.array([[scores[i] for i in ids] for scores in of_term]) for of_term in found]

    def per_run(self, terms: Sequence[Term], metric: str) -> list[Float[np.ndarray, " S"]] | None:
        """Each term's number per seed, for metrics that no single example has; None without any."""
        seeds = self.seeds([term.variant for term in terms])
        table = [[self._value(term, seed, metric) for seed in seeds] for term in terms]
        if not seeds or any(value is None for row in table for value in row):
            return None
        return [np.array(row, np.float64) for row in table]

    def _value(self, term: Term, seed: int, metric: str) -> float | None:
        for result in self.results(term.variant, seed):
            if (result.set, result.method, result.metric) == (term.set, term.method, metric):
                return result.value
        return None
