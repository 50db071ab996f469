"""A second store with the rows of a first: how a table that changed is not encoded anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cache.checksums import row_keys
from cache.copying import copy_rows
from cache.location import locate
from cache.manifest import manifest_location
from cache.store import RowStatus, open_store
from gill_files import PARTIAL_SUFFIX, link_or_copy


def begin_with_rows(source: str | Path, target: str | Path, keys: Iterable[str]) -> int:
    """Begin a store at `target` with what `source` has of a table's rows.

    keys: the fingerprint of every row of the table, as `fill` asks `key` for it. Gives how many
    rows are kept, and makes no store where there is none. Where every kept row stays at its place
    this is `share_store`; else rows are copied to their new places (`copy_rows`). Killed before it
    is whole, there is no `target` yet, and the next call begins anew; at a URL, where nothing can
    be renamed, there is one with the rows that were copied.
    """
    store = open_store(source)
    done = np.flatnonzero(store.status() == RowStatus.DONE)
    wanted, there = row_keys(keys), store.read_table("row_key")
    row_of = dict(zip(there[done].tolist(), done.tolist()))
    # Of equal rows the one at the same place, so that a shard can stay as it is.
    row_of_place = np.full(len(wanted), -1, np.int64)
    for row, key in enumerate(wanted.tolist()):
        at_home = row < len(there) and there[row] == wanted[row]
        row_of_place[row] = row if at_home else row_of.get(key, -1)
    kept = row_of_place >= 0
    if not kept.any():
        return 0
    if not locate(target).is_local:
        copy_rows(store, target, row_of_place.tolist())
        return int(kept.sum())
    target = Path(target)
    if store.location.is_local and (row_of_place[kept] == np.flatnonzero(kept)).all():
        share_store(store.location.path, target)
        return int(kept.sum())
    part = target.with_name(f"{target.stem}.part.zarr")
    shutil.rmtree(part, ignore_errors=True)  # of a killed call
    copy_rows(store, part, row_of_place.tolist())
    for beside in (manifest_location(part), locate(part).beside(".lock")):
        beside.remove()
    part.rename(target)
    return int(kept.sum())


def share_store(source: Path, target: Path) -> None:
    """Make a store at `target` with the rows of the one at `source`, both on this machine.

    Shards, which are only ever replaced whole, become hard links, or copies where there are no
    links; bookkeeping, which changes in place, is copied. Killed before it is whole, there is no
    `target` yet, and the next call begins anew.
    """
    arrays = set(open_store(source).spec.arrays)
    part = target.with_name(f"{target.name}.part")

    def copy(file: str, to: str) -> None:
        array, *inside = Path(file).relative_to(source).parts
        # Shards lie below `c/`; the array's own zarr.json changes with the number of rows.
        (link_or_copy if array in arrays and len(inside) > 1 else shutil.copy2)(file, to)

    shutil.rmtree(part, ignore_errors=True)
    ignored = shutil.ignore_patterns(f"*{PARTIAL_SUFFIX}")
    # Under another name until it is whole; what a killed call left there goes first.
    shutil.copytree(source, part, ignore=ignored, copy_function=copy)
    part.rename(target)
