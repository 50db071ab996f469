"""Columns of the caption table as sequences, and stores of what a frozen model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np

from cache import FillReport, Part, Roles, StoreSpec, fill
from cluster import crew_for
from cluster.versions import library_versions
from corpora.caption_table import CaptionTable
from gill_progress import Ticker
from pipeline.frozen.backbones import Backbone
from settings.params import RunParams

_BLOCK = 8192


class KeyedRow(NamedTuple):
    """One value of a row, and the key of its picture and caption.

    Both stores carry the same keys: that is what ties them together.
    """

    value: str
    key: str


class KeyedRows(Sequence[KeyedRow]):
    """The captions or the picture references of a table, with the rows' keys; read in blocks."""

    def __init__(self, table: CaptionTable, column: Literal["captions", "images"]) -> None:
        self._read = table.captions if column == "captions" else table.images
        self._keys = table.row_keys()

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, rows: int) -> KeyedRow: ...
    @overload
    def __getitem__(self, rows: slice) -> list[KeyedRow]: ...
    def __getitem__(self, rows: int | slice) -> KeyedRow | list[KeyedRow]:
        span = range(len(self))[rows]
        if isinstance(span, int):
            return self[span : span + 1][0]
        return [
            KeyedRow(value, _as_text(self._keys[row]))
            for value, row in zip(self._read(span), span, strict=True)
        ]

    def __iter__(self) -> Iterator[KeyedRow]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]


def row_fingerprints(table: CaptionTable) -> Iterator[str]:
    """What `fill_store` knows the rows of a table by."""
    return map(_as_text, table.row_keys())


def _as_text(key: np.ndarray) -> str:
    return key.tobytes().hex()


def fill_store(
    store: str | Path,
    rows: Sequence[KeyedRow],
    spec: StoreSpec,
    make_roles: Callable[[], Roles],
    backbone: Backbone,
    run: RunParams,
    batch_size: int,
    *,
    libraries: Sequence[str],
    part: Part | None = None,
    **provenance: str,
) -> FillReport:
    """Fill a store with what a frozen model makes of rows, wherever `run.scheduler` says.

    libraries: distributions of which workers must have the same versions, besides torch and zarr.
    """
    versions = library_versions("torch", "zarr", *libraries)
    with Ticker(Path(store).stem) as ticker:
        return fill(
            store,
            rows,
            spec,
            make_roles,
            provenance={
                "model": backbone.source,
                "revision": backbone.revision,
                "weights": backbone.fingerprint,
                "dtype": backbone.dtype,
                **provenance,
            },
            params=run.filling(batch_size),
            key=lambda row: row.key,
            crew=crew_for(run.scale_out, versions),
            versions=versions,
            retry_failed=True,  # whoever runs again may have mended a picture
            progress=ticker.count,
            part=part,
        )
