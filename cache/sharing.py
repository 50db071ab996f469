"""A second store that shares the shards of a first: how a table that grew is not encoded anew."""

from __future__ import annotations

import os
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
    shutil.rmtree(part, ignore_errors=True)
    for folder, _, names in os.walk(source):
        inside = Path(folder).relative_to(source)
        (part / inside).mkdir(parents=True, exist_ok=True)
        is_data = len(inside.parts) > 1 and inside.parts[0] in arrays
        for name in names:
            if name.endswith(PARTIAL_SUFFIX):
                continue
            copy = link_or_copy if is_data else shutil.copy2
            copy(os.path.join(folder, name), part / inside / name)
    part.rename(target)
