"""The evaluation's numbers in the shape that the report read before results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniature.world import ATTRIBUTES
from stages.results import Record, Result


def write_legacy(folder: Path, results: Sequence[Result], records: Sequence[Record]) -> None:
    """evaluation.json and records.json."""
    metrics: dict[str, Any] = {"captioning": {}, "retrieval": {}}
    for row in results:
        if row.value is None or row.method not in ("generator", "gill"):
            continue
        if row.metric in ("clip_similarity", "oracle_attributes"):
            one = metrics.setdefault(row.set, {"title": row.title, "examples": row.examples})
            found = one.setdefault(row.method, {})
            if row.metric == "clip_similarity":
                found["clip_similarity"] = {"mean": row.value, "standard_error": row.standard_error}
            else:
                found["oracle"] = {"attributes": row.value, "standard_error": row.standard_error}
        if row.table == "retrieval" and row.method == "gill":
            name = "all" if row.set == "all_scenes" else "held_out"
            kept = metrics["retrieval"].setdefault(name, {"candidates": row.examples})
            way = "image_to_text" if row.metric.startswith("image_to_text") else "text_to_image"
            kept.setdefault(way, {})[row.metric.rpartition("_")[2]] = row.value
    (folder / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    rows = [_record(record) for record in records if "gill" in record.pictures]
    (folder / "records.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _record(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {"set": record.set, "id": record.id, "prompt": record.prompt}
    row |= {"real": record.real, "scene": record.scene, **record.pictures}
    row["retrieval_score"] = record.scores.get("retrieved.similarity")
    for method in ("generator", "gill"):
        share = record.scores.get(f"{method}.oracle_attributes")
        row[f"{method}_right"] = None if share is None else round(share * len(ATTRIBUTES))
    return row
