"""Stage precompute-targets: T_psi of Eq. 3, the generator's text encoder over every caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from cache import ArraySpec, Codec, Roles, StoreSpec, fill
from corpora.caption_table import CaptionTable
from pipeline.backbones import Backbone, Backbones
from pipeline.text_conditioner import Conditioning, load_text_conditioner
from stages.caption_rows import KeyedRow, KeyedRows
from stages.devices import set_up
from stages.params import Params, RunParams
from stages.paths import ARTIFACTS
from stages.progress import Ticker
from stages.versions import library_versions


def run(params: Params, *, rebuild: bool) -> None:
    """Fill the target store with the captions that are not in it yet."""
    generator = Backbones.read(ARTIFACTS.backbones).image_generator
    widths = generator.widths
    dims = {"position": widths["L"], "channel": widths["text_width"]}
    table: Sequence[KeyedRow] = KeyedRows(CaptionTable(ARTIFACTS.captions), "captions")
    codec = params.targets.codec
    if params.targets.source == "online":
        # Only the empty prompt is kept, so there is nothing to fit a codec to.
        table, codec = [], Codec()
    arrays = {"embedding": ArraySpec(dims=dims, codec=codec)}
    constants = {"empty_embedding": dims}
    if "pooled_width" in widths:
        pooled = {"pooled_channel": widths["pooled_width"]}
        arrays["pooled"] = ArraySpec(dims=pooled)
        constants["empty_pooled"] = pooled
    with Ticker("targets") as ticker:
        report = fill(
            ARTIFACTS.targets,
            table,
            StoreSpec(arrays=arrays, constants=constants, shard_rows=params.targets.shard_rows),
            partial(make_roles, generator, params.run),
            provenance={
                "model": generator.source,
                "revision": generator.revision,
                "weights": generator.fingerprint,
                "dtype": generator.dtype,
            },
            params=params.targets.filling,
            key=lambda row: row.key,
            versions=library_versions("torch", "diffusers", "transformers", "zarr"),
            rebuild=rebuild,
            progress=ticker.show,
        )
    print(report)


def make_roles(generator: Backbone, run: RunParams) -> Roles:
    """Encode: captions to [b, L, D] and, for some generators, [b, D_pooled]."""
    device = set_up(run)
    conditioner = load_text_conditioner(generator.path, dtype=generator.torch_dtype, device=device)

    def encode(captions: list[str]) -> Mapping[str, np.ndarray]:
        return _arrays(conditioner.encode(captions))

    def constants() -> Mapping[str, np.ndarray]:
        empty = _arrays(conditioner.unconditional())
        return {f"empty_{name}": values[0] for name, values in empty.items()}

    def read(row: KeyedRow) -> str:
        return row.value

    return Roles(read=read, encode=encode, constants=constants)


def _arrays(conditioning: Conditioning) -> dict[str, np.ndarray]:
    found = {"embedding": conditioning.embedding}
    if conditioning.pooled is not None:
        found["pooled"] = conditioning.pooled
    # NumPy has no bfloat16; float16 is stored as it is.
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
        for name, tensor in found.items()
    }
