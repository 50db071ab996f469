"""How the index is made: W_i2t on every candidate's features, into FAISS."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from cache import RowStatus, begins_with, open_store, read_rows
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
from pipeline.talking.index_files import load_index, save_index
from pipeline.talking.retrieval import IndexPart, RetrievalError, RetrievalIndex, build_index
from settings.params import Params, RunParams

BLOCK_ROWS = 8192  # candidates per task


def make_projection(
    store: Path, checkpoint: Path, fingerprint: str, backbones: Path, run: RunParams
) -> Callable[[np.ndarray], np.ndarray]:
    """rows int64 [b] -> W_i2t of their features, float32 [b, p] of norm 1.

    Raises StageError where this machine sees another checkpoint than the fingerprinted one.
    """
    set_up(run.device, run.threads)
    # Keys of two checkpoints in one index would look right and retrieve nonsense.
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
    earlier: Iterable[Path] = (),
) -> None:
    """Index the pictures of a table, each once, and save the index to `folder`.

    training_only: of the table's rows only those of the split train.
    earlier: indexes by the same heads and settings. An exact one that has the first pictures of
        this table is extended by the others, which gives what building anew does, bit by bit. The
        other kinds place vectors by the pictures that they were built from, and are built anew.
    """
    set_up(params.run.device, params.run.threads)
    checkpoint = artifacts.heads(params.training.checkpoint)
    fingerprint = fingerprint_heads(checkpoint)
    features = open_store(store)
    rows = _first_of_each_picture(table, training_only)
    rows = rows[features.status()[rows] == RowStatus.DONE]
    make = partial(make_projection, store, checkpoint, fingerprint, artifacts.backbones, params.run)
    candidates = pa.table(
        {"row": rows, "image": table.images(rows), "caption": table.captions(rows)}
    )
    part = IndexPart(heads=fingerprint, features=features.meta["rows_fingerprint"], rows=len(rows))
    settings = IndexSettings.part_of(params.index)
    index = None
    if settings.kind == "flat":
        keys = features.read_table("row_key")
        index = next(filter(None, (_beginning(path, keys, candidates) for path in earlier)), None)
    with Ticker("index", unit="pictures") as ticker:
        start = 0 if index is None else len(index)
        blocks = _Blocks(rows[start:], make, params.run.scale_out)
        added = {"heads": part.heads, "features": part.features, "candidates": candidates[start:]}
        if index is None:
            index = build_index(
                blocks, settings, **added, progress=lambda done: ticker.count(done, len(rows))
            )
        elif start < len(rows):
            index.extend(blocks, **added)
    index.parts = (part,)
    save_index(index, folder)
    print(f"{len(index)} pictures in a {params.index.kind} index of width {index.width}")


def _beginning(
    folder: Path, keys: NDArray[np.uint64], candidates: pa.Table
) -> RetrievalIndex | None:
    """The whole blocks of a saved index, if its pictures are the first of these candidates.

    keys: uint64 [N] of all rows of the store, of which the saved one had the first.
    """
    try:
        index = load_index(folder)
    except RetrievalError:  # damaged: one that is built anew takes its place
        return None
    # A block of another size is rounded otherwise: the last, shorter one is computed again.
    whole = len(index) - len(index) % BLOCK_ROWS
    if not whole or index.candidates is None or candidates[:whole] != index.candidates[:whole]:
        return None
    if not begins_with(keys, index.parts[-1].features, int(index.rows.max()) + 1):
        return None
    print(f"{whole:,} of {len(candidates):,} pictures are taken from {folder}")
    index.vectors.remove_ids(np.arange(whole, len(index)))
    index.rows, index.candidates = index.rows[:whole], index.candidates[:whole]
    return index


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
