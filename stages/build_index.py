"""Stage build-index: W_i2t on every candidate's features, into a FAISS index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from app.artifacts import Artifacts
from app.gill import CHECKPOINTS, fingerprint_heads
from cache import iterate_blocks, open_store
from corpora.caption_table import CaptionTable
from corpora.captions import check_captions
from pipeline.backbones import Backbones
from pipeline.checkpoint import load_heads
from pipeline.heads import Heads
from pipeline.retrieval import build_index
from stages.devices import set_up
from stages.params import Params
from stages.paths import ARTIFACTS
from stages.precompute_features import fill_features
from stages.progress import Ticker


class _Blocks:
    """Rows and their retrieval vectors, block by block, as often as they are asked for."""

    def __init__(self, store: Path, rows: list[int], heads: Heads) -> None:
        self._store, self._rows, self._heads = store, rows, heads

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for block in iterate_blocks(self._store, ["pooled"], subset=self._rows):
            pooled = torch.from_numpy(block.arrays["pooled"]).float()
            keys = torch.nn.functional.normalize(self._heads.image_to_text(pooled), dim=-1)
            yield torch.from_numpy(block.rows), keys


def run(params: Params, *, rebuild: bool, artifacts: Artifacts = ARTIFACTS) -> None:
    """Index the candidates' pictures, each once."""
    set_up(params.run)
    checkpoint = artifacts.model / CHECKPOINTS[params.run.checkpoint]
    heads, _ = load_heads(checkpoint, backbones=Backbones.read(artifacts.backbones).fingerprints)
    table, store = _candidates(params, rebuild, artifacts)
    rows = _first_of_each_picture(table, params.index.candidates is None)
    with Ticker("index") as ticker:
        index = build_index(
            _Blocks(store, rows, heads.float()),
            params.index.settings,
            heads=fingerprint_heads(checkpoint),
            features=open_store(store).meta["rows_fingerprint"],
            candidates=pa.table(
                {"row": rows, "image": table.images(rows), "caption": table.captions(rows)}
            ),
            progress=lambda done: ticker.show(f"{done} of {len(rows)} pictures"),
        )
    index.save(artifacts.index)
    print(f"{len(index)} pictures in a {params.index.kind} index of width {index.width}")


def _candidates(params: Params, rebuild: bool, artifacts: Artifacts) -> tuple[CaptionTable, Path]:
    """The table and the features of the pictures to retrieve from; shared ones are only read."""
    source = params.index.candidates
    if source is None and params.captions.table == "miniature":
        source = str(artifacts.miniature / "candidates.tsv")
    if source is None:
        return CaptionTable(artifacts.captions), artifacts.features
    checked, store = artifacts.candidates, artifacts.candidate_features
    if artifacts.shared is not None:
        return CaptionTable(checked), store
    report = check_captions(params.captions.for_table(source), checked)
    print(report.source, report.kept, "candidates,", report.excluded, "excluded")
    table = CaptionTable(checked)
    print(fill_features(store, table, params, rebuild=rebuild))
    return table, store


def _first_of_each_picture(table: CaptionTable, training_only: bool) -> list[int]:
    """One row per picture: several captions of one picture are one candidate."""
    rows = table.rows_of_split("train") if training_only else range(len(table))
    seen: set[bytes] = set()
    kept = []
    for row, picture in zip(rows, table.pictures(rows), strict=True):
        if picture not in seen:
            seen.add(picture)
            kept.append(int(row))
    return kept
