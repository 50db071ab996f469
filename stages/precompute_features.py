"""Stage precompute-features: the visual encoder once over every picture, into a Zarr store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gill.artifacts import ARTIFACTS
from gill.dimensions import check_dimensions
from settings.params import Params
from stages.required import required
from stages.stores import settle
from workfolder import Entry, WorkFolder, code_of, file_md5


def run(params: Params, *, rebuild: bool = False, again: bool = False) -> None:
    """Make artifacts/features.zarr, unless exactly this store is in the work folder."""
    check_dimensions(ARTIFACTS, (), params.backbones.model_dump())

    def fill(store: Path) -> Any:
        from corpora.caption_table import CaptionTable
        from stages.feature_store import fill_features

        return fill_features(store, CaptionTable(ARTIFACTS.captions), params)

    entry = features_entry(WorkFolder.open(params.run.work), "features", ARTIFACTS.captions, params)
    settle(entry, ARTIFACTS.features, fill, rebuild=rebuild, again=again)


def features_entry(work: WorkFolder, kind: str, table: Path, params: Params) -> Entry:
    """The store of the pictures of a checked table, in this run's visual encoder."""
    manifest = required(ARTIFACTS.backbones, "prepare-backbones")
    encoder = json.loads(manifest.read_text(encoding="utf-8"))["visual_encoder"]
    return work.entry(
        kind,
        {
            "captions": file_md5(required(table, "prepare-captions")),
            "weights": encoder["fingerprint"],
            "dtype": encoder["dtype"],
            "layout": params.features.model_dump(mode="json"),
            "code": code_of(kind, work),
        },
    )
