"""Stores in the work folder: filled once, found by what decides them, linked in artifacts/."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gill.artifacts import ARTIFACTS
from gill_errors import StageError
from pipeline.frozen.backbones import Backbone, Backbones, Role
from settings.params import PrecomputeParams
from stages.required import required
from workfolder import Entry, WorkFolder, code_of, file_md5, place, place_link

if TYPE_CHECKING:
    from cache import FillReport

ROWS = "captions"
"""The part of `decided_by` that names the rows: stores that differ in nothing else share shards."""


def store_entry(
    work: WorkFolder, kind: str, table: Path, role: Role, layout: PrecomputeParams
) -> Entry:
    """The store of the rows of a checked table, as the pinned model of this role encodes them."""
    model: Backbone = getattr(Backbones.read(ARTIFACTS.backbones), role)
    return work.entry(
        kind,
        {
            ROWS: file_md5(required(table, "prepare-captions")),
            "weights": model.fingerprint,
            "dtype": model.dtype,
            "layout": layout.model_dump(mode="json"),
            "code": code_of(kind, work),
        },
    )


def settle(
    entry: Entry,
    where: Path,
    table: Path,
    fill: Callable[[Path], FillReport],
    *,
    rebuild: bool = False,
    again: bool = False,
) -> None:
    """Fill the entry's store unless it is finished, and make `where` (artifacts/NAME.zarr) lead
    to it, with its manifest beside.

    A new store begins with the rows of the table that another one has of the same models and
    layout, wherever they stand there. A store of an earlier version that lies at `where` is taken
    over.

    Args:
        rebuild: put what is there aside and encode every row anew.
        again: look for rows that are not done, although the store was finished (after a repair).
    """
    # Other workspaces may want the same store: they wait here, and then find it finished.
    manifest = _manifest(where)
    with entry.alone():
        if rebuild and (entry.begun or _take_over(where, entry)):
            print(f"{entry.kind}: what was there is put aside as {entry.put_aside()}")
        finished = entry.finished
        # A repair that was killed has taken the manifest away: its rows are still to be done.
        whole = (entry.folder / where.name).is_dir() and (entry.folder / manifest.name).is_file()
        if finished and whole and not again:
            rows, done = finished["summary"]["rows"], finished["summary"]["done"]
            print(f"{entry.kind}: nothing to do, {rows:,} rows lie in {entry.folder}")
            if done < rows:
                again_by = f"stages verify-cache {where} --repair"
                print(
                    f"  {rows - done:,} of them failed and are left out; `{again_by}` tries again"
                )
        else:
            _fill(entry, where, table, fill, anew=rebuild)
    place_link(entry.folder / where.name, where)
    place(entry.folder / manifest.name, manifest)
    entry.work.note_use(where.stem, entry)


def link_store(work: WorkFolder, where: Path) -> None:
    """Make `where` lead to the store that its manifest describes.

    DVC brings back a manifest without running the stage; the link beside it then follows here.

    Raises StageError where there is no manifest, or the work folder lacks the store.
    """
    manifest = _manifest(where)
    stage = f"stages precompute-{where.stem}"
    required(manifest, f"precompute-{where.stem}")
    if where.is_dir() and not where.is_symlink():
        raise StageError(
            f"{where} was made by an earlier version: run `{stage}`, which takes it over"
        )
    md5 = file_md5(manifest)
    # Where the link already leads to a store with this very manifest, nothing is to be done.
    beside = where.resolve().parent / manifest.name if where.is_symlink() else None
    if beside is not None and beside.is_file() and file_md5(beside) == md5:
        return
    entry = work.with_output(where.stem, manifest.name, md5)
    if entry is None:
        raise StageError(
            f"the store of {manifest} is not in the work folder {work.root}: run `{stage}` to "
            "encode its rows here, or copy it from the work folder that has it"
        )
    place_link(entry.folder / where.name, where)


def _fill(
    entry: Entry, where: Path, table: Path, fill: Callable[[Path], FillReport], *, anew: bool
) -> None:
    from cache import StoreMismatchError

    store = entry.folder / where.name
    if store.exists() and not entry.finished and where.is_dir() and not where.is_symlink():
        # Joined of parts, say: as far as that one has come, or further.
        print(f"{entry.kind}: what was begun is put aside as {entry.put_aside()}, for {where}")
    if not entry.begun:
        if why := entry.explain_absence(where.stem):
            print(f"{entry.kind}: {why}")
        entry.begin()
    entry.work.note_use(where.stem, entry)
    if not store.exists() and not anew and not _take_over(where, entry):
        _keep_rows(entry, where.name, table)
    began = time.monotonic()
    try:
        report = fill(store)
    except StoreMismatchError as error:
        # The key is the same but what lies inside is not: kept, so that nothing finished is lost.
        other = store.with_name(f"{store.stem}.earlier.zarr")
        store.rename(other)
        print(
            f"{entry.kind}: what lay at {where} was made otherwise, it is kept as {other}: {error}"
        )
        report = fill(store)
    print(report)
    entry.finish(
        [_manifest(where).name], time.monotonic() - began, rows=report.num_rows, done=report.done
    )


def _take_over(where: Path, entry: Entry) -> bool:
    """Move a store of an earlier version, a folder in artifacts/, to its place."""
    if not where.is_dir() or where.is_symlink():
        return False
    entry.begin()
    where.rename(entry.folder / where.name)
    print(f"{where} is taken over into {entry.folder}")
    return True


def _keep_rows(entry: Entry, name: str, table: Path) -> None:
    """Begin with the rows that a store has which differs in its rows alone."""
    from cache import begin_with_rows
    from corpora.caption_table import CaptionTable
    from stages.caption_rows import row_fingerprints

    for other in entry.work.entries(entry.kind):
        # Weights, dtype, layout and code alike: a row's key then says whether it can be kept.
        alike = {**other.decided_by, ROWS: None} == {**entry.decided_by, ROWS: None}
        if other.key == entry.key or not alike or not (other.folder / name).is_dir():
            continue
        if other.is_held():  # being filled now: its tables change while they are read
            continue
        keys = row_fingerprints(CaptionTable(table))
        if kept := begin_with_rows(other.folder / name, entry.folder / name, keys):
            print(f"{entry.kind}: begins with {kept:,} rows of {other.folder}")
            return


def _manifest(where: Path) -> Path:
    """artifacts/features.zarr -> artifacts/features.manifest.json."""
    return where.with_suffix(".manifest.json")
