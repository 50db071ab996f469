"""Table 6: what fit-decision measured, as results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluation.published import DECISION_METHODS
from evaluation.results import Result
from evaluation.scores import Found, Rows


def table_6(folder: Path, seed: int) -> list[Result]:
    """PartiPrompts, retrieve or generate: macro F1 of every method on held-out prompts.

    Section 3.3 and appendix C: 911 prompts on which at least four of five people agree, a third of
    them held out (`corpora.parti_prompts.paper_split`); on the miniature the oracle votes. Fitted
    and measured by the stage fit-decision; `decision_fitting` says which F1 is printed.
    Thresholds are chosen on the training prompts, where the paper's ranges go over all thresholds.
    """
    metrics = _read(folder / "evaluation.json")
    labels = metrics.get("labels", {})
    total = sum(labels.values())
    tested = metrics.get("rows", {})
    examples = tested.get("test_gen", 0) + tested.get("test_ret", 0)
    rows = Rows("decision", "Retrieve or generate", examples, total, seed)
    if not metrics.get("fitted"):
        why = metrics.get("why", f"{folder} holds no fitted classifier: run `stages fit-decision`")
        return [rows.absent("linear", "macro_f1", why)]
    results = []
    for method in DECISION_METHODS:
        if method not in metrics:
            why = "votes of several people are needed" if method == "human" else "not measured"
            results.append(rows.absent(method, "macro_f1", why))
            continue
        found = Found(
            whole={name: metrics[method][name] for name in ("macro_f1", "f1_gen", "f1_ret")}
        )
        results += rows.results(method, found)
    return results


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
