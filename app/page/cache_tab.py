"""The page's second tab: look into the stores by caption, picture, row and neighbour."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.encoded_pictures import picture_uri
from cache import DamagedRowsError, EmbeddingStore, describe, iterate_blocks, open_store, view_row
from corpora.caption_table import CaptionTable
from corpora.pictures import PictureError, open_picture
from gill.artifacts import Artifacts
from gill.loading import Gill

_SHOWN = 24
_MOST_ROWS = 50_000
"""Rows that a search by neighbours reads; of a larger store an evenly spread sample."""
_MISSING = Image.new("RGB", (64, 64), "#c9c9d2")

# Which table a store was made from: its rows are that table's.
_STORES = {
    "features.zarr": "captions.parquet",
    "targets.zarr": "captions.parquet",
    "candidates.zarr": "candidates.parquet",
}

# To those who hear the page Gradio calls a tile "Thumbnail 3 of 16", and says its caption twice.
NAME_BY_CAPTION = """
() => {
  const name = () => {
    for (const tile of document.querySelectorAll('#cache-tiles .thumbnail-item[aria-label]')) {
      tile.removeAttribute('aria-label');
      for (const image of tile.querySelectorAll('img')) image.alt = '';
    }
  };
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
}
"""


class Browser:
    """The stores below a run's folder, each with its caption table where it still fits."""

    def __init__(self, gill: Gill, artifacts: Artifacts) -> None:
        self._gill, self._artifacts = gill, artifacts
        self.names = [name for name in _STORES if (artifacts.root / name).is_dir()]
        self._tables: dict[Path, CaptionTable] = {}

    def store(self, name: str) -> EmbeddingStore:
        """An open store; ValueError for a name that is none of `names`."""
        if name not in self.names:
            raise ValueError(f"there is no store {name}")
        return open_store(self._artifacts.root / name)

    def table(self, name: str, num_rows: int) -> CaptionTable | None:
        """The caption table of a store, if it has as many rows."""
        path = self._artifacts.captions.with_name(_STORES[name])
        if not path.is_file():
            return None
        if path not in self._tables:
            self._tables[path] = CaptionTable(path)
        table = self._tables[path]
        return table if len(table) == num_rows else None

    def by_caption(self, name: str, text: str) -> list[int]:
        """The first rows whose caption has all the words; all words empty: the first rows."""
        num_rows = self.store(name).num_rows
        table = self.table(name, num_rows)
        if table is None:
            raise ValueError(f"{name} has no caption table of its size: search by row or picture")
        words = text.lower().split()
        found: list[int] = []
        for start in range(0, num_rows, 8192):
            span = range(start, min(start + 8192, num_rows))
            for row, caption in zip(span, table.captions(span), strict=True):
                if all(word in caption.lower() for word in words):
                    found.append(row)
                    if len(found) == _SHOWN:
                        return found
        return found

    def by_picture(self, name: str, picture: Image.Image) -> list[tuple[int, float]]:
        """The rows whose pooled visual vectors are nearest to the picture's, with the cosines."""
        store = self.store(name)
        if "pooled" not in store.spec.arrays:
            raise ValueError(f"{name} holds no visual vectors: search features.zarr instead")
        query = self._gill.encoder.encode_pictures([picture])[0].float().cpu().numpy()
        query /= np.linalg.norm(query)
        rows, cosines = [], []
        for block in iterate_blocks(store, ["pooled"], subset=self.sample(store)):
            values = block.arrays["pooled"].astype(np.float32)
            norms = np.maximum(np.linalg.norm(values, axis=1), np.finfo(np.float32).tiny)
            rows.append(block.rows)
            cosines.append(values @ query / norms)
        if not rows:
            return []
        every, scores = np.concatenate(rows), np.concatenate(cosines)
        best = np.argsort(-scores, kind="stable")[:_SHOWN]
        return [(int(every[i]), float(scores[i])) for i in best]

    def sample(self, store: EmbeddingStore) -> NDArray[np.int64] | None:
        """The rows to search where there are too many, else None for all."""
        if store.num_rows <= _MOST_ROWS:
            return None
        return np.linspace(0, store.num_rows - 1, _MOST_ROWS).astype(np.int64)

    def tiles(self, name: str, rows: Sequence[tuple[int, float | None]]) -> list[tuple[Any, str]]:
        """Pictures with their captions, for a gallery."""
        table = self.table(name, self.store(name).num_rows)
        tiles = []
        for row, cosine in rows:
            words = f"row {row}" + (f" · {cosine:.4f}" if cosine is not None else "")
            picture = _MISSING
            if table is not None:
                words += f" · {table.captions([row])[0]}"
                picture = _thumbnail(table.images([row])[0])
            tiles.append((picture, words))
        return tiles

    def describe_row(self, name: str, row: int) -> tuple[str, list[tuple[int, float]]]:
        """A row as HTML, and its nearest neighbours."""
        store = self.store(name)
        if not 0 <= row < store.num_rows:
            raise ValueError(f"{name} has rows 0 to {store.num_rows - 1}")
        view = view_row(store, row, num_neighbours=_SHOWN // 2, candidates=self.sample(store))
        facts = {"row": str(row), "status": view.status, "key": view.key}
        if view.reason:
            facts["reason"] = view.reason
        table = self.table(name, store.num_rows)
        picture = ""
        if table is not None:
            one = table[row]
            facts |= {"caption": one.caption, "picture": str(one.image), "id": one.id}
            facts |= {"split": one.split}
            picture = _inline(str(one.image))
        facts |= {f"norm of {array}": f"{norm:.4g}" for array, norm in view.norms.items()}
        facts |= {"neighbours by": f"cosine of {view.array}"}
        return f"<div class='row-facts'>{picture}{_table(facts)}</div>", view.neighbours

    def provenance(self, name: str) -> str:
        """What the store is and what it was made from, as HTML."""
        told = describe(self.store(name))
        facts = {
            "rows": f"{told.num_rows:,} ("
            + ", ".join(f"{count:,} {status}" for status, count in told.status.items())
            + ")"
        }
        for array in told.arrays:
            shape = " × ".join(f"{size:,}" for size in array.shape)
            facts[array.name] = (
                f"{shape}, {array.dtype}, {array.codec}; {array.stored_bytes / 1e6:,.1f} MB, "
                f"1/{array.compression_ratio:.2f} of float32"
            )
        facts |= {name: f"constant, shape {shape}" for name, shape in told.constants.items()}
        facts |= {f"made from: {k}": _plain(v) for k, v in told.provenance.items()}
        facts |= {f"version {i + 1}": _plain(v) for i, v in enumerate(told.versions)}
        facts |= {f"row {row} failed": why for row, why in list(told.failures.items())[:10]}
        facts |= {f"DAMAGED {i + 1}": text for i, text in enumerate(told.damage)}
        return f"<div class='row-facts'>{_table(facts)}</div>"


def cache_tab(gill: Gill, artifacts: Artifacts) -> None:
    """Build the tab inside a `gr.Blocks`."""
    browser = Browser(gill, artifacts)
    if not browser.names:
        gr.Markdown("There is no store here: the stages `precompute-*` make them.")
        return
    found = gr.State([])
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            name = gr.Radio(browser.names, value=browser.names[0], label="store")
            text = gr.Textbox(label="words of a caption", elem_id="cache-text", submit_btn="Search")
            picture = gr.Image(
                type="filepath",
                image_mode=None,  # as it was uploaded: `open_picture` checks and converts it
                label="or a picture",
                sources=["upload", "clipboard"],
                height=160,
                # What Gradio calls it to those who hear the page.
                placeholder="Drop an image file here to upload",
                elem_id="cache-picture",
            )
            row = gr.Number(0, minimum=0, precision=0, label="or a row", elem_id="cache-row")
            show = gr.Button("Show the row", size="sm", elem_id="cache-show")
        with gr.Column(scale=3, min_width=320):
            note = gr.Markdown("Search, then click on a picture to see its row and neighbours.")
            tiles = gr.Gallery(
                label="found",
                columns=4,
                height="auto",
                allow_preview=False,
                object_fit="contain",
                buttons=[],
                elem_id="cache-tiles",
                interactive=False,
                visible=False,  # an empty one has a name that its role may not have
            )
            about = gr.HTML(elem_id="cache-about")
    with gr.Accordion("Provenance", open=False):
        origin = gr.HTML()
    outputs = [note, tiles, found, about]

    def guarded(search: Any) -> Any:
        def run(*given: Any) -> Any:
            try:
                return search(*given)
            except (ValueError, PictureError, DamagedRowsError, LookupError) as error:
                return str(error), gr.skip(), gr.skip(), gr.skip()

        return run

    def gallery(store: str, rows: Sequence[tuple[int, float | None]]) -> gr.Gallery:
        return gr.Gallery(browser.tiles(store, rows), visible=bool(rows))

    def search_text(store: str, words: str) -> Any:
        rows = [(one, None) for one in browser.by_caption(store, words)]
        count = f"the first {_SHOWN} rows" if len(rows) == _SHOWN else f"{len(rows)} rows"
        what = f"with “{words}” in the caption" if words.strip() else "of the store"
        return f"{count} {what}", gallery(store, rows), [one for one, _ in rows], ""

    def search_picture(store: str, path: str | None) -> Any:
        if path is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        rows = browser.by_picture(store, open_picture(path))
        return (
            "rows nearest to the picture, by the cosine of their visual vectors",
            gallery(store, rows),
            [one for one, _ in rows],
            "",
        )

    def show_row(store: str, number: float | None) -> Any:
        about, neighbours = browser.describe_row(store, int(number or 0))
        found = gallery(store, neighbours)
        return f"nearest to row {int(number or 0)}", found, [one for one, _ in neighbours], about

    def pick(store: str, rows: list[int], event: gr.SelectData) -> Any:
        return rows[event.index], *guarded(show_row)(store, rows[event.index])

    hidden: dict[str, Any] = {"api_visibility": "private"}
    text.submit(guarded(search_text), [name, text], outputs, **hidden)
    picture.change(guarded(search_picture), [name, picture], outputs, **hidden)
    show.click(guarded(show_row), [name, row], outputs, **hidden)
    tiles.select(pick, [name, found], [row, *outputs], **hidden)
    name.change(browser.provenance, [name], origin, **hidden)
    name.change(guarded(search_text), [name, text], outputs, **hidden)
    origin.attach_load_event(lambda: browser.provenance(browser.names[0]), None)


def _thumbnail(reference: str) -> Image.Image:
    try:
        picture = open_picture(reference)
    except PictureError:
        return _MISSING
    picture.thumbnail((256, 256))
    if max(picture.size) < 96:
        picture = picture.resize((picture.width * 4, picture.height * 4), Image.Resampling.NEAREST)
    return picture


def _inline(reference: str) -> str:
    return f'<img alt="" src="{picture_uri(_thumbnail(reference))}">'


def _table(facts: dict[str, str]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in facts.items()
    )
    return f"<table>{cells}</table>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
