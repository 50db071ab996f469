"""What the target store holds: T_psi(y) of Eq. 3, the generator's text encoder over captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import Codec, FillReport, Part, Roles
from corpora.caption_table import CaptionTable
from gill.artifacts import ARTIFACTS
from gill.frozen import read_backbones
from gill.store_specs import targets_spec
from pipeline.devices import Arriving, filled_up, set_up
from pipeline.frozen.backbones import Backbone
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.text_conditioner import load_text_conditioner
from settings.params import Params, RunParams
from stages.caption_rows import KeyedRow, KeyedRows, fill_store


def fill_targets(store: str | Path, params: Params, part: Part | None = None) -> FillReport:
    """Fill the store with the captions of the checked table that are not in it yet."""
    generator = read_backbones(ARTIFACTS).image_generator
    widths = generator.widths
    spec = targets_spec(params, widths["L"], widths["text_width"], widths.get("pooled_width"))
    rows: Sequence[KeyedRow] = []  # online: only the empty prompt is kept
    if params.targets.source == "cache":
        rows = KeyedRows(CaptionTable(ARTIFACTS.captions), "captions")
    return fill_store(
        store,
        rows,
        spec,
        partial(make_roles, generator, params.run, spec.arrays["embedding"].codec),
        generator,
        params.run,
        params.run.batch_sizes.targets,
        libraries=("diffusers", "transformers"),
        part=part,
    )


def make_roles(generator: Backbone, run: RunParams, codec: Codec) -> Roles:
    """Encode: captions to [b, L, D] and, for some generators, [b, D_pooled].

    What NumPy cannot hold (bfloat16) is widened only where the store keeps more than 16 bits.
    """
    device = set_up(run.device, run.threads)
    conditioner = load_text_conditioner(generator.path, dtype=generator.torch_dtype, device=device)

    narrowed = torch.float16 if codec.dtype == "float16" else torch.float32

    def encode(captions: list[str]) -> Mapping[str, Any]:
        whole = conditioner.encode(filled_up(captions, run.batch_sizes.targets, device))
        return _arrays(whole.part(slice(len(captions))), narrowed)

    def constants() -> Mapping[str, np.ndarray]:
        empty = _arrays(conditioner.unconditional(), torch.float32)
        return {f"empty_{name}": np.asarray(values)[0] for name, values in empty.items()}

    def read(row: KeyedRow) -> str:
        return row.value

    return Roles(read=read, encode=encode, constants=constants)


def _arrays(conditioning: Conditioning, narrowed: torch.dtype) -> dict[str, Arriving]:
    found = {"embedding": Arriving(conditioning.embedding, narrowed)}
    if conditioning.pooled is not None:
        found["pooled"] = Arriving(conditioning.pooled)
    return found
