"""Look into a store: its shape, cost and provenance; a row among its neighbours; an HTML page.

Functions return data; `*_panel` functions make it a rich renderable, `write_page` an HTML file that
needs nothing else.
"""

from __future__ import annotations

import base64
import heapq
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table as RichTable

from cache.reading import DamagedRowsError, iterate_blocks, read_rows
from cache.store import EmbeddingStore, RowStatus, open_store

NORM_SAMPLE = 512  # rows, spread evenly over those that are done


@dataclass(frozen=True)
class ArrayDescription:
    """One array of a store. Bytes: as float32 and as stored; norms: L2, of a sample of rows."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str
    codec: str
    chunk_rows: int
    shard_rows: int
    num_files: int
    stored_bytes: int
    value_bytes: int
    norms: NDArray[np.float32]
    measured: dict[str, float]

    @property
    def compression_ratio(self) -> float:
        """float32 bytes of the rows that are done, over the bytes of their files."""
        return self.value_bytes / self.stored_bytes if self.stored_bytes else math.nan


@dataclass(frozen=True)
class StoreDescription:
    """A store as a whole. damage: what the sample came upon; `verify` finds all of it."""

    location: str
    num_rows: int
    status: dict[str, int]
    failures: dict[int, str]
    arrays: list[ArrayDescription]
    constants: dict[str, tuple[int, ...]]
    provenance: dict[str, Any]
    versions: list[dict[str, str]]
    fitted: str | None
    damage: list[str]


@dataclass(frozen=True)
class RowView:
    """One row: norms per array, and its nearest neighbours [(row, cosine)] in one of them."""

    row: int
    status: str
    reason: str | None
    key: str
    norms: dict[str, float]
    array: str
    neighbours: list[tuple[int, float]]

    @property
    def shown(self) -> list[tuple[int, str]]:
        """The row and its neighbours, each with a note on it."""
        alike = [(row, f"cosine {cosine:.4f}") for row, cosine in self.neighbours]
        return [(self.row, self.reason or self.status), *alike]


def describe(where: str | Path | EmbeddingStore) -> StoreDescription:
    """What a store is and holds. Reads the bookkeeping and a sample of rows, not the whole."""
    store = open_store(where)
    done = np.flatnonzero(store.status() == RowStatus.DONE)
    sample = done[np.unique(np.linspace(0, len(done) - 1, min(NORM_SAMPLE, len(done))).astype(int))]
    arrays, damage = [], []
    for name, spec in store.spec.arrays.items():
        try:
            norms = _norms(read_rows(store, sample, [name])[name])
        except DamagedRowsError as e:
            norms = np.zeros(0, np.float32)
            damage.append(str(e))
        stored_bytes, num_files = store.location.bytes_stored(name, "c")
        arrays.append(
            ArrayDescription(
                name=name,
                shape=(store.num_rows, *spec.shape),
                dims=("row", *spec.dims),
                dtype=spec.codec.dtype,
                codec=_codec_text(spec.codec.compressor, spec.codec.level, spec.codec.share_first),
                chunk_rows=store.spec.inner_rows(name),
                shard_rows=store.spec.shard_rows,
                num_files=num_files,
                stored_bytes=stored_bytes,
                value_bytes=len(done) * math.prod(spec.shape) * 4,
                norms=norms,
                measured=store.meta.get("measured", {}).get(name, {}),
            )
        )
    return StoreDescription(
        location=str(store.location),
        num_rows=store.num_rows,
        status=store.status_counts(),
        failures=store.failures(),
        arrays=arrays,
        constants={name: tuple(dims.values()) for name, dims in store.spec.constants.items()},
        provenance=store.provenance,
        versions=store.meta["versions"],
        fitted=store.meta.get("fitted"),
        damage=damage,
    )


def view_row(
    where: str | Path | EmbeddingStore,
    row: int,
    *,
    array: str | None = None,
    num_neighbours: int = 5,
    candidates: Iterable[int] | None = None,
) -> RowView:
    """One row and its nearest neighbours by the cosine of `array` (the first one, flattened).

    Reads all rows once; on a large store, name some `candidates` instead.
    """
    store = open_store(where)
    array = array or next(iter(store.spec.arrays))
    key = f"{int(store.table('row_key')[row]):016x}"  # type: ignore[arg-type]
    status = RowStatus(int(store.table("row_status")[row]))  # type: ignore[arg-type]
    if status != RowStatus.DONE:
        return RowView(row, status.name.lower(), store.failures().get(row), key, {}, array, [])
    values = read_rows(store, [row])
    query = values[array][0].astype(np.float32).ravel()
    best: list[tuple[float, int]] = []
    for batch in iterate_blocks(store, [array], block_rows=256, subset=candidates):
        block = batch.arrays[array].astype(np.float32).reshape(len(batch.rows), -1)
        scale = np.linalg.norm(block, axis=1) * np.linalg.norm(query)
        cosines = block @ query / np.maximum(scale, np.finfo(np.float32).tiny)
        found = [(float(c), int(r)) for c, r in zip(cosines, batch.rows) if r != row]
        best = heapq.nlargest(num_neighbours, best + found)
    norms = {name: float(_norms(value)[0]) for name, value in values.items()}
    return RowView(row, "done", None, key, norms, array, [(r, c) for c, r in best])


def store_panel(description: StoreDescription) -> Group:
    """A rich renderable of a description."""
    status = ", ".join(f"{count:,} {name}" for name, count in description.status.items())
    arrays = RichTable(title=f"{description.location}: {description.num_rows:,} rows ({status})")
    for heading, *_ in _ARRAY_COLUMNS:
        arrays.add_column(heading)
    for array in description.arrays:
        arrays.add_row(*(cell(array) for _, cell in _ARRAY_COLUMNS))
    facts = RichTable("", "", show_header=False)
    for name, text in _facts(description):
        facts.add_row(name, text)
    return Group(arrays, facts)


def row_panel(view: RowView, label: Callable[[int], str] | None = None) -> RichTable:
    """A rich renderable of a row and its neighbours. label: row -> its caption, or the like."""
    table = RichTable(
        "row", "cosine", "what", title=f"row {view.row} ({view.status}), by {view.array}"
    )
    label = label or _nothing
    norms = ", ".join(f"|{name}| = {norm:.4g}" for name, norm in view.norms.items())
    table.add_row(str(view.row), "", " ".join([label(view.row), view.reason or norms]).strip())
    for row, cosine in view.neighbours:
        table.add_row(str(row), f"{cosine:.4f}", label(row))
    return table


def write_page(
    where: str | Path | EmbeddingStore,
    page: str | Path,
    *,
    rows: Iterable[int] = (),
    label: Callable[[int], str] | None = None,
    picture: Callable[[int], bytes | None] | None = None,
    num_neighbours: int = 5,
    candidates: Iterable[int] | None = None,
) -> None:
    """Write one self-contained HTML page about a store, and `rows` with their neighbours.

    label: row -> text; picture: row -> bytes of a PNG or JPEG, or None.
    """
    store = open_store(where)
    description = describe(store)
    candidates = None if candidates is None else list(candidates)
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("page.html")
    text = template.render(
        store=description,
        columns=_ARRAY_COLUMNS,
        facts=_facts(description),
        histograms=[_histogram(array) for array in description.arrays],
        views=[
            view_row(store, row, num_neighbours=num_neighbours, candidates=candidates)
            for row in rows
        ],
        label=label or _nothing,
        picture=lambda row: _picture_uri(picture(row)) if picture else None,
    )
    Path(page).parent.mkdir(parents=True, exist_ok=True)
    Path(page).write_text(text, encoding="utf-8")


def _codec_text(compressor: str, level: int, share_first: bool) -> str:
    parts = ["uncompressed" if compressor == "none" else f"{compressor} level {level}"]
    if share_first:
        parts.append("position 0 stored once")
    return ", ".join(parts)


_ARRAY_COLUMNS: list[tuple[str, Callable[[ArrayDescription], str]]] = [
    ("array", lambda a: a.name),
    ("shape", lambda a: " x ".join(f"{d} {s:,}" for d, s in zip(a.dims, a.shape))),
    ("stored as", lambda a: f"{a.dtype}, {a.codec}"),
    ("shards", lambda a: f"{a.num_files:,} of {a.shard_rows} rows, chunks of {a.chunk_rows}"),
    ("size", lambda a: f"{a.stored_bytes / 1e6:,.1f} MB, 1/{a.compression_ratio:.2f} of float32"),
    (
        "error",
        lambda a: f"{a.measured.get('relative_squared_error_mean', 0):.2g} (relative squared)",
    ),
    (
        "norms",
        lambda a: (
            f"{a.norms.mean():.4g} ± {a.norms.std():.2g} "
            f"({a.norms.min():.4g} to {a.norms.max():.4g})"
            if len(a.norms)
            else "-"
        ),
    ),
]


def _facts(description: StoreDescription) -> list[tuple[str, str]]:
    facts = [("provenance", json.dumps(description.provenance, indent=1))]
    facts += [("versions", json.dumps(versions)) for versions in description.versions]
    facts += [(name, f"constant, shape {shape}") for name, shape in description.constants.items()]
    if description.fitted:
        facts.append(("fitted", description.fitted))
    facts += [("DAMAGED", text) for text in description.damage]
    failures = list(description.failures.items())
    facts += [(f"row {row} failed", reason) for row, reason in failures[:20]]
    if len(failures) > 20:
        facts.append(("", f"and {len(failures) - 20:,} failed rows more"))
    return facts


def _norms(values: np.ndarray) -> NDArray[np.float32]:
    """L2 norm of every row: [n, ...] -> float32 [n]."""
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    return np.linalg.norm(flat.astype(np.float32), axis=1)


def _histogram(
    array: ArrayDescription, bins: int = 32
) -> tuple[str, NDArray[np.float64], float, float]:
    """How an array's norms are distributed: name, bars of height 0 to 1, first and last edge."""
    counts, edges = np.histogram(array.norms, bins)
    return array.name, counts / max(1, counts.max()), edges[0], edges[-1]


def _picture_uri(content: bytes | None) -> str | None:
    if not content:
        return None
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _nothing(_row: int) -> str:
    return ""
