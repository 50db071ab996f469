"""Commands inspect-cache and verify-cache: look into a store, and check it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from cache import describe, open_store, repair, row_panel, store_panel, verify, view_row, write_page
from corpora.caption_table import CaptionRow, CaptionTable
from corpora.pictures import open_picture
from gill.artifacts import ARTIFACTS
from gill_errors import StageError
from gill_progress import Ticker
from settings.params import Params
from stages import precompute_features, precompute_latents, precompute_targets


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
        found = _find(
            captions,
            f"--caption {caption!r}",
            lambda row: row.caption == caption,
            lambda row: caption in row.caption,
        )
        rows.append(found)
    if image is not None:
        found = _find(
            captions,
            f"--image {image}",
            lambda row: Path(row.image).resolve() == image.resolve(),
            lambda row: Path(row.image).name == image.name,
        )
        rows.append(found)
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
    """Re-read a store against its checksums. True if it is sound.

    With `mend` bad rows are encoded again, and those that failed or were never done.
    """
    with Ticker("verifying") as ticker:
        report = verify(store, ticker.count)
    print(report)
    if not mend or (report.ok and open_store(store).status_counts()["done"] == report.num_rows):
        return report.ok
    again = {
        str(ARTIFACTS.features): precompute_features.run,
        str(ARTIFACTS.targets): precompute_targets.run,
        str(ARTIFACTS.latents): precompute_latents.run,
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


def _find(
    table: CaptionTable | None,
    asked: str,
    is_it: Callable[[CaptionRow], bool],
    is_like_it: Callable[[CaptionRow], bool],
) -> int:
    """The first row that `is_it`, or else the first that `is_like_it`; `asked` names the option."""
    if table is None:
        raise StageError(f"{asked} needs the caption table of this store: name it with --table")
    alike = None
    for number, row in enumerate(table):
        if is_it(row):
            return number
        if alike is None and is_like_it(row):
            alike = number
    if alike is None:
        raise StageError(f"{asked}: {table.path} has no such row")
    return alike


def _png(reference: str) -> bytes:
    picture = open_picture(reference)
    picture.thumbnail((256, 256))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
