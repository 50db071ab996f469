"""Stage precompute-targets: T_psi of Eq. 3, the generator's text encoder over every caption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gill.artifacts import ARTIFACTS
from gill.dimensions import check_dimensions
from settings.params import Params
from stages.required import required
from stages.stores import settle
from workfolder import WorkFolder, code_of, file_md5


def run(params: Params, *, rebuild: bool = False, again: bool = False) -> None:
    """Make artifacts/targets.zarr, unless exactly this store is in the work folder."""
    check_dimensions(ARTIFACTS, (), params.backbones.model_dump())

    def fill(store: Path) -> Any:
        from stages.target_store import fill_targets

        return fill_targets(store, params)

    work = WorkFolder.open(params.run.work)
    manifest = required(ARTIFACTS.backbones, "prepare-backbones")
    generator = json.loads(manifest.read_text(encoding="utf-8"))["image_generator"]
    entry = work.entry(
        "targets",
        {
            "captions": file_md5(required(ARTIFACTS.captions, "prepare-captions")),
            "weights": generator["fingerprint"],
            "dtype": generator["dtype"],
            "layout": params.targets.model_dump(mode="json"),
            "code": code_of("targets", work),
        },
    )
    settle(entry, ARTIFACTS.targets, fill, rebuild=rebuild, again=again)
