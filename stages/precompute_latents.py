"""Stage precompute-latents: the generator's autoencoder once over every picture, where the
objective has a denoising loss; otherwise nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gill.artifacts import ARTIFACTS, Artifacts
from gill.dimensions import check_dimensions
from gill.latent_specs import latents_layout
from gill.world import have_world
from settings.params import Params
from stages.parts import fill_part
from stages.stores import settle, store_entry
from workfolder import WorkFolder, write_json


def run(
    params: Params,
    artifacts: Artifacts = ARTIFACTS,
    *,
    rebuild: bool = False,
    again: bool = False,
    part: str | None = None,
    to: str | None = None,
) -> None:
    """Make latents.zarr, unless exactly this store is in the work folder, or nobody reads it.

    part: `3/8`, to fill that part alone, at `to`.
    """
    if not params.objective.diffusion_weight:
        # DVC expects the file of every stage: this one says that there is no store.
        write_json(artifacts.latents.with_suffix(".manifest.json"), {"content": None})
        artifacts.latents.unlink(missing_ok=True)  # a link: the store stays until it is pruned
        WorkFolder.open(params.run.work).note_use(artifacts.latents.stem, None)
        print("latents: nothing to do, objective.diffusion_weight is 0")
        return
    check_dimensions(artifacts, (), params)

    def fill(store: str | Path, part: Any = None) -> Any:
        from stages.latent_store import fill_latents

        if params.is_miniature:  # pulled, or used with another work folder before
            have_world(work, artifacts.miniature, params.captions.miniature.model_dump())
        return fill_latents(store, params, artifacts, part)

    work, table = WorkFolder.open(params.run.work), artifacts.captions
    if part is not None:
        fill_part(artifacts.latents, part, to, fill)
        return
    entry = store_entry(work, "latents", table, "image_generator", latents_layout(params))
    settle(
        entry,
        artifacts.latents,
        table,
        fill,
        stores=params.run.stores,
        rebuild=rebuild,
        again=again,
    )
