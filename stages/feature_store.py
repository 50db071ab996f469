"""What a feature store holds: the visual encoder over every picture of a caption table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cache import FillReport, Part, Roles
from corpora.caption_table import CaptionTable
from corpora.pictures import open_picture
from gill.artifacts import ARTIFACTS
from gill.frozen import read_backbones
from gill.store_specs import features_spec
from pipeline.devices import Arriving, filled_up, multiply_in_tf32, set_up
from pipeline.frozen.backbones import Backbone
from pipeline.frozen.visual_encoder import load_visual_encoder
from settings.params import Params, RunParams
from stages.caption_rows import KeyedRow, KeyedRows, fill_store


def fill_features(
    store: str | Path, table: CaptionTable, params: Params, part: Part | None = None
) -> FillReport:
    """Fill any feature store from any caption table: the training pictures, or other candidates."""
    encoder = read_backbones(ARTIFACTS).visual_encoder
    return fill_store(
        store,
        KeyedRows(table, "images"),
        features_spec(params, encoder.widths["d"]),
        partial(make_roles, encoder, params.run),
        encoder,
        params.run,
        params.run.batch_sizes.features,
        libraries=("open_clip_torch", "pillow"),
        part=part,
        vector="pooled vector before the projection",
    )


def make_roles(encoder: Backbone, run: RunParams) -> Roles:
    """Read: open a picture, as bytes of the encoder's size. Encode: pooled vectors [b, d]."""
    device = set_up(run.device, run.threads)
    multiply_in_tf32(device)  # where the encoder computes in float32
    model = load_visual_encoder(encoder.path, dtype=encoder.torch_dtype, device=device)

    def read(row: KeyedRow) -> Any:
        return model.preprocess(open_picture(row.value))

    def encode(pixels: list[Any]) -> Mapping[str, Any]:
        whole = filled_up(pixels, run.batch_sizes.features, device)
        return {"pooled": Arriving(model.pooled_of(whole)[: len(pixels)])}

    return Roles(read=read, encode=encode)
