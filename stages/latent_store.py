"""What the latent store holds: the generator's autoencoder over every picture of a table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cache import FillReport, Part, Roles
from corpora.caption_table import CaptionTable
from corpora.pictures import open_picture
from gill.artifacts import Artifacts
from gill.frozen import read_backbones
from gill.latent_specs import latents_spec
from pipeline.devices import Arriving, filled_up, multiply_in_tf32, set_up
from pipeline.frozen.backbones import Backbone
from pipeline.frozen.latent_encoder import latent_shape, load_latent_encoder
from settings.params import Params, RunParams
from stages.caption_rows import KeyedRow, KeyedRows, fill_store


def fill_latents(
    store: str | Path, params: Params, artifacts: Artifacts, part: Part | None = None
) -> FillReport:
    """Fill the store with the pictures of the checked table that are not in it yet."""
    generator = read_backbones(artifacts).image_generator
    return fill_store(
        store,
        KeyedRows(CaptionTable(artifacts.captions), "images"),
        latents_spec(params, latent_shape(generator.path)),
        partial(make_roles, generator, params.run),
        generator,
        params.run,
        params.run.batch_sizes.pictures,
        libraries=("diffusers", "pillow"),
        part=part,
        vector="mean and deviation of the latents, not scaled",
    )


def make_roles(generator: Backbone, run: RunParams) -> Roles:
    """Read: open a picture, as bytes of the generator's size. Encode: [b, 2, C, H, W]."""
    device = set_up(run.device, run.threads)
    multiply_in_tf32(device)
    encoder = load_latent_encoder(generator.path, device=device)

    def read(row: KeyedRow) -> Any:
        return encoder.preprocess(open_picture(row.value))

    def encode(pixels: list[Any]) -> Mapping[str, Any]:
        whole = filled_up(pixels, run.batch_sizes.pictures, device)
        return {"posterior": Arriving(encoder.encode(whole)[: len(pixels)])}

    return Roles(read=read, encode=encode)
