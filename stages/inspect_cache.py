"""Commands inspect-cache and verify-cache: look into a store, and check it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from cache import describe, open_store, repair, row_panel, store_panel, verify, view_row, write_page
from corpora.caption_table import CaptionTable
from corpora.pictures import open_picture
from gill.artifacts import ARTIFACTS
from gill_errors import StageError
from gill_progress import Ticker
from settings.params import Params
from stages import precompute_features, precompute_targets


def inspect(
    store: str,
    *,
    row: int | None,
    caption: str | None,
    image: Path | None,
    html: Path | None,
    table: Path,
) -> None:
    """Print what a store is, and one row with its nearest neighbours; or write a page of both."""
    captions = _matching_table(store, table)
    rows = [] if row is None else [row]
    if caption is not None:
        rows.append(_find(captions, "caption", lambda t: _row_of_caption(t, caption)))
    if image is not None:
        rows.append(_find(captions, "image", lambda t: _row_of_image(t, image)))
    label = None if captions is None else lambda r: captions.captions([r])[0]
    if html is not None:
        picture = None if captions is None else lambda r: _png(captions.images([r])[0])
        write_page(store, html, rows=rows, label=label, picture=picture)
        print(f"open {html}")
        return
    console = Console()
    console.print(store_panel(describe(store)))
    for one in rows:
        console.print(row_panel(view_row(store, one), label))
        if captions is not None:
            console.print(f"picture: {captions.images([one])[0]}")


def check(store: str, params: Params, *, mend: bool) -> bool:
    """Re-read a store against its checksums; with `mend` encode bad rows again. True if sound."""
    with Ticker("verifying") as ticker:
        report = verify(store, ticker.count)
    print(report)
    if report.ok or not mend:
        return report.ok
    again = {
        str(ARTIFACTS.features): precompute_features.run,
        str(ARTIFACTS.targets): precompute_targets.run,
    }
    if str(Path(store)) not in again:
        raise StageError(f"{store} is not one of {', '.join(again)}: run what made it again")
    repair(store, report)
    again[str(Path(store))](params, again=True)
    report = verify(store)
    print(report)
    return report.ok


def _matching_table(store: str, table: Path) -> CaptionTable | None:
    """The caption table, where it has as many rows as the store."""
    if not table.is_file():
        return None
    found = CaptionTable(table)
    return found if len(found) == open_store(store).num_rows else None


def _find(table: CaptionTable | None, what: str, find: Callable[[CaptionTable], int]) -> int:
    if table is None:
        raise StageError(f"--{what} needs the caption table of this store: name it with --table")
    return find(table)


def _row_of_caption(table: CaptionTable, text: str) -> int:
    """The first row with this caption, or else the first that contains it."""
    partial = None
    for start in range(0, len(table), 8192):
        span = range(start, min(start + 8192, len(table)))
        for row, caption in zip(span, table.captions(span), strict=True):
            if caption == text:
                return row
            if partial is None and text in caption:
                partial = row
    if partial is None:
        raise StageError(f"no caption of {table.path} contains {text!r}")
    return partial


def _row_of_image(table: CaptionTable, image: Path) -> int:
    """The first row whose picture is this file, or has its name."""
    by_name = None
    for start in range(0, len(table), 8192):
        span = range(start, min(start + 8192, len(table)))
        for row, reference in zip(span, table.images(span), strict=True):
            if Path(reference).resolve() == image.resolve():
                return row
            if by_name is None and Path(reference).name == image.name:
                by_name = row
    if by_name is None:
        raise StageError(f"no row of {table.path} has the picture {image}")
    return by_name


def _png(reference: str) -> bytes:
    picture = open_picture(reference)
    picture.thumbnail((256, 256))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
