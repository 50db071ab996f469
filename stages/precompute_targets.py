"""Stage precompute-targets: T_psi of Eq. 3, the generator's text encoder over every caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gill.artifacts import ARTIFACTS
from gill.dimensions import check_dimensions
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
    """Make artifacts/targets.zarr, unless exactly this store is in the work folder.

    part: `3/8`, to fill that part alone, at `to`.
    """
    check_dimensions(ARTIFACTS, (), params)

    def fill(store: str | Path, part: Any = None) -> Any:
        from stages.target_store import fill_targets

        return fill_targets(store, params, part)

    if part is not None:
        fill_part(ARTIFACTS.targets, part, to, fill)
        return
    work, table = WorkFolder.open(params.run.work), ARTIFACTS.captions
    entry = store_entry(work, "targets", table, "image_generator", params.targets)
    settle(
        entry,
        ARTIFACTS.targets,
        table,
        fill,
        stores=params.run.stores,
        rebuild=rebuild,
        again=again,
    )
