"""How the index is made: W_i2t on every candidate's features, into FAISS."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from torch import Tensor

from cache import RowStatus, open_store, read_rows
from cluster import ScaleOutParams, map_in_order
from cluster.versions import library_versions
from corpora.caption_table import CaptionTable
from gill.artifacts import Artifacts
from gill_errors import StageError
from gill_progress import Ticker
from pipeline.bridge.checkpoint import fingerprint_heads, load_heads
from pipeline.devices import set_up
from pipeline.frozen.backbones import Backbones
from pipeline.settings import IndexSettings
from pipeline.talking.index_files import save_index
from pipeline.talking.retrieval import build_index
from settings.params import Params, RunParams

BLOCK_ROWS = 8192  # candidates per task


def make_projection(
    store: Path, checkpoint: Path, fingerprint: str, backbones: Path, run: RunParams
) -> Callable[[np.ndarray], np.ndarray]:
    """rows int64 [b] -> W_i2t of their features, float32 [b, p] of norm 1.

    Raises StageError where this machine sees another checkpoint than the fingerprinted one.
    """
    set_up(run.device, run.threads)
    if fingerprint_heads(checkpoint) != fingerprint:
        raise StageError(
            f"{checkpoint} on {socket.gethostname()} is not the file that the index is built with: "
            "all machines of a cluster need the same files"
        )
    found = Backbones.read(backbones).fingerprints
    heads = load_heads(checkpoint, backbones=found)[0].float()
    features = open_store(store)

    @torch.no_grad()
    def project(rows: np.ndarray) -> np.ndarray:
        pooled = torch.from_numpy(read_rows(features, rows, ["pooled"])["pooled"]).float()
        return torch.nn.functional.normalize(heads.image_to_text(pooled), dim=-1).numpy()

    return project


class _Blocks:
    """Rows and their retrieval vectors, block by block, as often as they are asked for.

    W_i2t runs wherever `run.scheduler` says; the vectors come back in the order of the rows. They
    are added here, for a FAISS index is one object in one memory, and adding is what costs least.
    """

    def __init__(
        self, rows: Int64[np.ndarray, " N"], make: Callable[[], Any], params: ScaleOutParams
    ) -> None:
        self._make, self._params = make, params
        self._blocks = [rows[i : i + BLOCK_ROWS] for i in range(0, len(rows), BLOCK_ROWS)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        keys = map_in_order(
            self._make, self._blocks, self._params, versions=library_versions("torch", "zarr")
        )
        for rows, block in zip(self._blocks, keys, strict=True):
            yield torch.from_numpy(rows), torch.from_numpy(block)


def make_index(
    table: CaptionTable,
    store: Path,
    folder: Path,
    params: Params,
    artifacts: Artifacts,
    *,
    training_only: bool,
) -> None:
    """Index the pictures of a table, each once, and save the index to `folder`.

    training_only: of the table's rows only those of the split train.
    """
    set_up(params.run.device, params.run.threads)
    checkpoint = artifacts.heads(params.training.checkpoint)
    fingerprint = fingerprint_heads(checkpoint)
    features = open_store(store)
    rows = _first_of_each_picture(table, training_only)
    rows = rows[features.status()[rows] == RowStatus.DONE]
    make = partial(make_projection, store, checkpoint, fingerprint, artifacts.backbones, params.run)
    with Ticker("index", unit="pictures") as ticker:
        index = build_index(
            _Blocks(rows, make, params.run.scale_out),
            IndexSettings.part_of(params.index),
            heads=fingerprint,
            features=features.meta["rows_fingerprint"],
            candidates=pa.table(
                {"row": rows, "image": table.images(rows), "caption": table.captions(rows)}
            ),
            progress=lambda done: ticker.count(done, len(rows)),
        )
    save_index(index, folder)
    print(f"{len(index)} pictures in a {params.index.kind} index of width {index.width}")


def _first_of_each_picture(table: CaptionTable, training_only: bool) -> np.ndarray:
    """Rows int64 [N], one per picture: several captions of one picture are one candidate."""
    rows = table.rows_of_split("train") if training_only else range(len(table))
    seen: set[bytes] = set()
    kept = []
    for row, picture in zip(rows, table.pictures(rows), strict=True):
        if picture not in seen:
            seen.add(picture)
            kept.append(int(row))
    return np.asarray(kept, np.int64)
