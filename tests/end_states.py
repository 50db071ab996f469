"""What a whole run of the stages has left: its rows, and its bytes. Holds no test."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import zarr

TIMED = ("latency", "seconds", "rows_per_second", "memory")
"""In the names of results that no two runs have alike."""


def rows_of(folder: Path) -> dict[str, Counter[Any]]:
    """Every row of the checked table, the stores, the index and the evaluation, by what it is."""
    artifacts = folder / "artifacts"
    rows: dict[str, Counter[Any]] = {}
    for table in sorted(artifacts.rglob("*.parquet")):
        text = pq.read_table(table).to_pylist()
        rows[str(table.relative_to(folder))] = Counter(
            json.dumps(_timeless(row), default=str, sort_keys=True) for row in text
        )
    for store in sorted(artifacts.glob("*.zarr")):
        group = zarr.open_group(store, mode="r")
        keys, status = group["row_key"][:].tolist(), group["row_status"][:].tolist()
        rows[store.name] = Counter(zip(range(len(keys)), keys, status))
    return rows


def bytes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that two undisturbed runs have alike."""
    return dict(_files(folder))


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    artifacts = folder / "artifacts"
    for root, _, names in os.walk(artifacts, followlinks=True):
        for name in names:
            path = Path(root) / name
            content = path.read_bytes()
            if path.suffix == ".json":
                content = json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
            if not any(part in str(path) for part in ("report/", "records.parquet")):
                yield str(path.relative_to(folder)), hashlib.sha256(content).hexdigest()


def _timeless(value: Any) -> Any:
    """A JSON value without what clocks wrote."""
    if isinstance(value, dict):
        return {
            key: _timeless(inner)
            for key, inner in value.items()
            if not any(word in key for word in TIMED)
        }
    if isinstance(value, list):
        return [_timeless(inner) for inner in value if not _is_timed(inner)]
    return value


def _is_timed(value: Any) -> bool:
    return isinstance(value, dict) and any(word in str(value.get("table", "")) for word in TIMED)
