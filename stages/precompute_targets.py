"""Stage precompute-targets: T_psi of Eq. 3, the generator's text encoder over every caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gill.artifacts import ARTIFACTS
from gill.dimensions import check_dimensions
from settings.params import Params
from stages.stores import settle, store_entry
from workfolder import WorkFolder


def run(params: Params, *, rebuild: bool = False, again: bool = False) -> None:
    """Make artifacts/targets.zarr, unless exactly this store is in the work folder."""
    check_dimensions(ARTIFACTS, (), params)

    def fill(store: Path) -> Any:
        from stages.target_store import fill_targets

        return fill_targets(store, params)

    work, table = WorkFolder.open(params.run.work), ARTIFACTS.captions
    entry = store_entry(work, "targets", table, "image_generator", params.targets)
    settle(entry, ARTIFACTS.targets, table, fill, rebuild=rebuild, again=again)
