"""Stage precompute-features: the visual encoder once over every picture, into a Zarr store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gill.artifacts import ARTIFACTS
from gill.dimensions import check_dimensions
from gill.world import have_world
from settings.params import Params
from stages.parts import fill_part
from stages.stores import settle, store_entry
from workfolder import WorkFolder


def run(
    params: Params,
    *,
    rebuild: bool = False,
    again: bool = False,
    part: str | None = None,
    to: str | None = None,
) -> None:
    """Make artifacts/features.zarr, unless exactly this store is in the work folder.

    part: `3/8`, to fill that part alone, at `to`.
    """
    check_dimensions(ARTIFACTS, (), params)

    def fill(store: str | Path, part: Any = None) -> Any:
        from corpora.caption_table import CaptionTable
        from stages.feature_store import fill_features

        if params.is_miniature:  # pulled, or used with another work folder before
            have_world(work, ARTIFACTS.miniature, params.captions.miniature.model_dump())
        return fill_features(store, CaptionTable(ARTIFACTS.captions), params, part)

    work, table = WorkFolder.open(params.run.work), ARTIFACTS.captions
    if part is not None:
        fill_part(ARTIFACTS.features, part, to, fill)
        return
    entry = store_entry(work, "features", table, "visual_encoder", params.features)
    settle(
        entry,
        ARTIFACTS.features,
        table,
        fill,
        stores=params.run.stores,
        rebuild=rebuild,
        again=again,
    )
