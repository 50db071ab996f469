"""The manifest: a small JSON file beside a store, which DVC tracks in place of the shards.

Two stores of equal content have equal manifests, byte for byte: nothing in it depends on when,
where or by how many workers the store was made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cache.checksums import digest
from cache.layout import checksum_name, error_name
from cache.location import Location, locate
from cache.store import EmbeddingStore, RowStatus
from gill_files import explained


def manifest_location(store: str | Path | Location) -> Location:
    """`artifacts/targets.zarr` -> `artifacts/targets.manifest.json`."""
    return locate(store).beside(".manifest.json")


def make_manifest(store: EmbeddingStore) -> dict[str, Any]:
    """Rows, checksums and provenance of a store, as JSON values.

    content: SHA-256 over status, keys and every row's checksum; shards: per array and shard, the
    first digits of that over its rows, so that a manifest from elsewhere names the shard that
    differs.
    """
    status, keys = store.status(), store.read_table("row_key")
    sums = {name: store.read_table(checksum_name(name)) for name in store.spec.arrays}
    meta = store.meta
    return {
        "format": meta["format"],
        "num_rows": len(status),
        "status": store.status_counts(),
        "rows_fingerprint": meta.get("rows_fingerprint", ""),
        "content": digest(status, keys, *sums.values()),
        "measured": measure(store),
        "spec": meta["spec"],
        "provenance": meta["provenance"],
        "versions": meta["versions"],
        "shards": {
            name: [
                digest(values[i : i + store.spec.shard_rows])[:8]
                for i in range(0, len(values), store.spec.shard_rows)
            ]
            for name, values in sums.items()
        },
    }


def measure(store: EmbeddingStore) -> dict[str, dict[str, float]]:
    """What storing cost the rows that are done: relative squared error, mean and worst."""
    done = store.status() == RowStatus.DONE
    measured = {}
    for name, array in store.spec.arrays.items():
        if array.codec.is_lossy and done.any():
            error = store.read_table(error_name(name))[done].astype(np.float64)
            measured[name] = {
                "relative_squared_error_mean": float(error.mean()),
                "relative_squared_error_max": float(error.max()),
            }
    return measured


def write_manifest(store: EmbeddingStore) -> None:
    """Write the manifest, unless it is there and equal (so that its time stamp tells something)."""
    text = json.dumps(make_manifest(store), indent=1, sort_keys=True) + "\n"
    where = manifest_location(store.location)
    if where.read_text() != text:
        with explained(where):
            where.write_text(text)


def settle(store: EmbeddingStore) -> None:
    """Write the manifest of a store in which no row is pending. Under the run lock."""
    if not (store.status() == RowStatus.PENDING).any():
        store.update_meta(measured=measure(store))
        write_manifest(store)


def read_manifest(store: str | Path | Location) -> dict[str, Any]:
    """Raises FileNotFoundError for an unfinished store: only a settled one has a manifest."""
    where = manifest_location(store)
    text = where.read_text()
    if text is None:
        raise FileNotFoundError(f"{where}: no manifest; a store gets one when all rows are settled")
    return json.loads(text)
