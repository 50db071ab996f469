"""The built-in world of pictures, drawn where it is asked for and not there yet."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workfolder import WorkFolder, code_of, place_link


def have_world(work: WorkFolder, place: Path, sizes: Mapping[str, Any]) -> Path:
    """Make `place` (artifacts/miniature) lead to exactly the world that was asked for.

    Args:
        sizes: keywords of `miniature.corpus.draw`; those that are absent have its defaults.

    Gives the path of its caption table. It is drawn in seconds, once for all workspaces.
    """
    from miniature import corpus

    signature = inspect.signature(corpus.draw).parameters.values()
    defaults = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    entry = work.entry(
        "miniature",
        {"world": {**defaults, **sizes}, "code": code_of("miniature", work)},
    )
    world, asked = entry.folder / "world", entry.decided_by["world"]

    def draw() -> None:
        print(f"drawing {asked['pictures']} pictures of the miniature world")
        shutil.rmtree(world, ignore_errors=True)  # of a run that was killed while drawing
        corpus.draw(world, **asked)

    entry.make_once(["world/drawn.json"], draw)
    if place.is_dir() and not place.is_symlink():
        print(f"{place} of an earlier version is kept as {place.rename(f'{place}.earlier')}")
    place_link(world, place)
    work.note_use("miniature", entry)
    return place / "captions.tsv"
