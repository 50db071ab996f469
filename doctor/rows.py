"""How many rows a caption table has, without checking it. For `stages doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from gill.artifacts import ARTIFACTS
from settings.params import Params

PAPER_ROWS = 3_300_000
"""Conceptual Captions, as section 3.4 says."""


@dataclass(frozen=True)
class Rows:
    """How many rows there are, and how that is known."""

    number: int
    known_from: str


def count_rows(params: Params, given: int | None) -> Rows:
    """From --rows, from the checked table, from the table itself, else the paper's number."""
    if given is not None:
        return Rows(given, "--rows")
    table = params.captions.table
    report = ARTIFACTS.captions.with_name("captions.report.json")
    if ARTIFACTS.captions.exists() and report.exists():
        source = json.loads(report.read_text(encoding="utf-8"))["source"]
        if source == table or (table == "miniature" and "miniature" in Path(source).parts):
            return Rows(pq.read_metadata(ARTIFACTS.captions).num_rows, str(ARTIFACTS.captions))
    if table == "miniature":
        drawn = params.captions.miniature
        pictures = drawn.pictures + 2 * drawn.held_out_pictures
        return Rows(pictures * drawn.captions_per_picture, "captions.miniature")
    path = Path(table)
    if path.suffix in (".parquet", ".pq") and path.is_file():
        return Rows(pq.read_metadata(path).num_rows, table)
    if path.is_file() and path.suffix in (".tsv", ".csv", ".txt", ".jsonl"):
        with path.open("rb") as file:
            return Rows(max(0, sum(1 for _ in file) - 1), table)
    counted = sum(_img2dataset_rows(path)) if path.is_dir() else 0
    if counted:
        return Rows(counted, f"the *_stats.json of {table}")
    return Rows(PAPER_ROWS, f"assumed: CC3M as in the paper, as {table} is not here; --rows N")


def _img2dataset_rows(folder: Path) -> Iterator[int]:
    for file in sorted(folder.glob("*_stats.json")):
        yield int(json.loads(file.read_text(encoding="utf-8")).get("successes", 0))
