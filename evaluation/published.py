"""The numbers that the paper prints, which lie in published.yaml."""

from __future__ import annotations

from pathlib import Path

import yaml

_PRINTED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

PUBLISHED: dict[tuple[str, str, str, str], float] = {
    (table, set_, method, metric): number
    for table, metrics in _PRINTED.items()
    for metric, sets in metrics.items()
    for set_, methods in sets.items()
    for method, number in methods.items()
}
"""By (table, set, method, metric) as in `evaluation.results`."""

DECISION_METHODS: tuple[str, ...] = tuple(_PRINTED["table_6"]["macro_f1"]["decision"])
"""Those that Table 6 compares, in its order."""


def published(table: str, set_: str, method: str, metric: str) -> float | None:
    """The paper's number in this place, None where it prints none."""
    return PUBLISHED.get((table, set_, method, metric))
