"""A second store that shares the shards of a first: how a table that grew is not encoded anew."""

from __future__ import annotations

import shutil
from pathlib import Path

from cache.store import open_store
from gill_files import PARTIAL_SUFFIX, link_or_copy


def share_store(source: Path, target: Path) -> None:
    """Make a store at `target` with the rows of the one at `source`, both on this machine.

    Shards, which are only ever replaced whole, become hard links, or copies where there are no
    links; bookkeeping, which changes in place, is copied. The attributes come last: killed before,
    `target` is no store yet, and the next call begins anew.
    """
    arrays = set(open_store(source).spec.arrays)
    part = target.with_name(f"{target.name}.part")

    def copy(file: str, to: str) -> None:
        array, *inside = Path(file).relative_to(source).parts
        (link_or_copy if array in arrays and len(inside) > 1 else shutil.copy2)(file, to)

    shutil.rmtree(part, ignore_errors=True)
    ignored = shutil.ignore_patterns(f"*{PARTIAL_SUFFIX}")
    shutil.copytree(source, part, ignore=ignored, copy_function=copy)
    part.rename(target)
