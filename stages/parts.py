"""Stores in parts: each machine fills one on its own disk, and one machine joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gill_errors import StageError
from gill_progress import Ticker

if TYPE_CHECKING:
    from cache import FillReport, Part


def fill_part(
    where: Path, text: str, to: str | None, fill: Callable[[str | Path, Part], FillReport]
) -> None:
    """Fill part `text` (3/8) of the store at `where`, at `to` or beside it.

    A part is no entry of the work folder, which holds what is whole.
    """
    from cache import Part

    part = Part.parse(text)
    store = to or where.with_name(f"{where.stem}.part-{part.number}-of-{part.of}.zarr")
    print(fill(store, part))
    print(
        f"part {part} lies at {store}; where all {part.of} are: "
        f"`stages join-stores PART... --to {where}`, then `stages precompute-{where.stem}`"
    )


def join(parts: Sequence[str], to: str) -> None:
    """Make one store of parts; raises StageError where that is a link into the work folder."""
    from cache import join_stores

    if Path(to).is_symlink():
        raise StageError(
            f"{to} is a link to the store in use, {Path(to).readlink()}: remove the link, or name "
            "another path"
        )
    with Ticker("joining", unit="shards") as ticker:
        store = join_stores(parts, to, ticker.count)
    counts = store.status_counts()
    print(f"{to}: {store.num_rows:,} rows, {counts['done']:,} done, {counts['failed']:,} failed")
