"""Looking into a store."""

import base64
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_cache_samples import captions, fill_sample, make_spec, value

from cache import describe, row_panel, store_panel, view_row, write_page

COUNT = 60


@pytest.fixture(scope="module")
def rows() -> list[str]:
    rows = captions(COUNT)
    rows[7] = "unreadable <b>"
    return rows


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> Path:
    path = tmp_path_factory.mktemp("inspected") / "s.zarr"
    fill_sample(path, rows, spec=make_spec(dtype="int8", share_first=True))
    return path


def shown(renderable: object) -> str:
    console = Console(width=220)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_description(path: Path, rows: list[str]) -> None:
    description = describe(path)
    assert description.status == {"pending": 0, "done": 59, "failed": 1}
    assert description.failures == {7: "OSError: cannot open unreadable <b>"}
    assert description.constants == {"empty_embedding": (5, 6)}
    embedding, pooled = description.arrays
    assert (embedding.shape, embedding.dims) == ((60, 5, 6), ("row", "position", "channel"))
    assert (embedding.dtype, embedding.num_files) == ("int8", 8)
    assert embedding.codec == "uncompressed, position 0 stored once"
    index = 16 + 4  # one inner chunk per shard: its place, and the checksum of the index
    assert embedding.stored_bytes == 60 // 8 * (8 * 24 + index) + (8 * 24 + index)
    assert embedding.compression_ratio == 59 * 30 * 4 / embedding.stored_bytes
    good = [value(row) for i, row in enumerate(rows) if i != 7]
    np.testing.assert_allclose(embedding.norms, [np.linalg.norm(v) for v in good], rtol=1e-3)
    np.testing.assert_allclose(pooled.norms, [np.linalg.norm(v[-1]) for v in good], rtol=1e-6)
    text = shown(store_panel(description))
    words = ("60 rows", "1 failed", "int8", "row 7 failed", "hash", "spread evenly", "position 5")
    assert all(word in text for word in words)


def test_neighbours_by_cosine(path: Path, rows: list[str]) -> None:
    view = view_row(path, 20, array="pooled", num_neighbours=3)
    all_values = np.stack([value(row)[-1] for row in rows])
    unit = all_values / np.linalg.norm(all_values, axis=1, keepdims=True)
    cosines = unit @ unit[20]
    cosines[[7, 20]] = -2
    want = np.argsort(-cosines)[:3]
    assert [row for row, _ in view.neighbours] == want.tolist()
    np.testing.assert_allclose([c for _, c in view.neighbours], cosines[want], rtol=1e-5)
    some = view_row(path, 20, array="pooled", num_neighbours=3, candidates=[1, 7, 20, 30])
    assert {row for row, _ in some.neighbours} == {1, 30}
    text = shown(row_panel(view, label=lambda row: rows[row]))
    assert rows[want[0]] in text
    assert f"{cosines[want[0]]:.4f}" in text


def test_a_failed_row_shows_why(path: Path) -> None:
    view = view_row(path, 7)
    assert (view.status, view.neighbours) == ("failed", [])
    assert "cannot open unreadable" in shown(row_panel(view))


def test_page(path: Path, rows: list[str], tmp_path: Path) -> None:
    picture = b"\x89PNG\r\n\x1a\n" + bytes(8)
    page = tmp_path / "out" / "page.html"
    write_page(
        path,
        page,
        rows=[3, 7],
        label=lambda row: rows[row],
        picture=lambda row: picture if row == 3 else None,
        num_neighbours=2,
    )
    text = page.read_text()
    assert f"data:image/png;base64,{base64.b64encode(picture).decode()}" in text
    assert "unreadable &lt;b&gt;" in text
    assert "<b>" not in text
    assert len(re.findall("<svg", text)) == 2
    assert not re.search(r"https?://|src=\"(?!data:)", text)  # needs nothing else
    assert "caption 3" in text


def test_a_damaged_store_can_be_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, captions(20))
    (path / "embedding/c/1/0/0").write_bytes(b"")
    description = describe(path)
    assert "embedding/c/1/0/0" in description.damage[0]
    assert len(description.arrays[0].norms) == 0
    assert len(description.arrays[1].norms) == 20
    assert "DAMAGED" in shown(store_panel(description))


def test_an_empty_store(tmp_path: Path) -> None:
    fill_sample(tmp_path / "s.zarr", [])
    assert "0 rows" in shown(store_panel(describe(tmp_path / "s.zarr")))
    write_page(tmp_path / "s.zarr", tmp_path / "page.html")
