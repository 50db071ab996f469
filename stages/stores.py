"""Stores in the work folder, or at a URL that it keeps the record of: filled once, found by what
decides them, linked in artifacts/."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gill.artifacts import ARTIFACTS
from gill_errors import StageError
from gill_files import explained, written_whole
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
    fill: Callable[[str | Path], FillReport],
    *,
    stores: str | None = None,
    rebuild: bool = False,
    again: bool = False,
) -> None:
    """Fill the entry's store unless it is finished, and make `where` (artifacts/NAME.zarr) lead
    to it, with its manifest beside.

    A new store begins with the rows of the table that another one has of the same models and
    layout, wherever they stand there. A store of an earlier version that lies at `where` is taken
    over.

    Args:
        stores: the URL below which it lies; None: in the work folder, which has its manifest and
            record either way.
        rebuild: put what is there aside and encode every row anew.
        again: look for rows that are not done, although the store was finished (after a repair).

    Raises StageError for what cannot be done at a URL.
    """
    store: str | Path = entry.folder / where.name
    if stores is not None:
        store = f"{stores}/{entry.name}/{where.name}"
        _refuse_at_url(store, where, rebuild)
    # Other workspaces may want the same store: they wait here, and then find it finished.
    manifest = _manifest(where)
    with entry.alone():
        if rebuild and (entry.begun or _take_over(where, entry)):
            print(f"{entry.kind}: what was there is put aside as {entry.put_aside()}")
        finished = entry.finished
        # A repair that was killed has taken the manifest away: its rows are still to be done.
        if finished and _is_whole(entry, store, manifest.name) and not again:
            rows, done = finished["summary"]["rows"], finished["summary"]["done"]
            lie = entry.folder if stores is None else store
            print(f"{entry.kind}: nothing to do, {rows:,} rows lie in {lie}")
            if _place_of(entry, where.name) != store:  # it lies in both
                _record(entry, store, manifest.name, finished["seconds"], rows, done)
            if done < rows:
                again_by = f"stages verify-cache {where} --repair"
                print(
                    f"  {rows - done:,} of them failed and are left out; `{again_by}` tries again"
                )
        else:
            _fill(entry, store, where, table, fill, anew=rebuild)
    place_link(store, where)
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
    place_link(_place_of(entry, where.name), where)


def _refuse_at_url(store: str, where: Path, rebuild: bool) -> None:
    """What a stage does with folders and cannot do with objects, which nothing renames."""
    if rebuild:
        raise StageError(
            f"{store}: a store at a URL is not put aside, as --rebuild would; remove it with your "
            "object store's own tools, and run without --rebuild"
        )
    if where.is_dir() and not where.is_symlink():
        raise StageError(
            f"{where} is a folder, and run.stores has this store at {store}: `stages join-stores "
            f"{where} --to {store}`, move the folder away, and run again"
        )


def _place_of(entry: Entry, name: str) -> str | Path:
    """Where the store of a finished entry lies: a folder in it, or the URL that it recorded."""
    finished = entry.finished or {"summary": {}}
    return finished["summary"].get("store", entry.folder / name)


def _is_whole(entry: Entry, store: str | Path, manifest: str) -> bool:
    """Whether the store of a finished entry is there, with the manifest that the entry has."""
    ours = entry.folder / manifest
    if isinstance(store, Path):
        return store.is_dir() and ours.is_file()
    from cache import manifest_location

    there = manifest_location(store).read_text()
    return there is not None and ours.is_file() and ours.read_text(encoding="utf-8") == there


def _fill(
    entry: Entry,
    store: str | Path,
    where: Path,
    table: Path,
    fill: Callable[[str | Path], FillReport],
    *,
    anew: bool,
) -> None:
    from cache import StoreMismatchError, manifest_location

    if _exists(store) and not entry.finished and where.is_dir() and not where.is_symlink():
        # Joined of parts, say: as far as that one has come, or further.
        print(f"{entry.kind}: what was begun is put aside as {entry.put_aside()}, for {where}")
    if not entry.begun:
        if why := entry.explain_absence(where.stem):
            print(f"{entry.kind}: {why}")
        entry.begin()
    entry.work.note_use(where.stem, entry)
    if not _exists(store) and not anew and not _take_over(where, entry):
        _keep_rows(entry, store, where.name, table)
    began = time.monotonic()
    try:
        report = fill(store)
    except StoreMismatchError as error:
        if not isinstance(store, Path):
            raise
        # The key is the same but what lies inside is not: kept, so that nothing finished is lost.
        other = store.with_name(f"{store.stem}.earlier.zarr")
        store.rename(other)
        print(
            f"{entry.kind}: what lay at {where} was made otherwise, it is kept as {other}: {error}"
        )
        report = fill(store)
    print(report)
    manifest = entry.folder / _manifest(where).name
    if not isinstance(store, Path):
        with explained(manifest), written_whole(manifest) as part:
            part.write_text(manifest_location(store).read_text() or "", encoding="utf-8")
    seconds = time.monotonic() - began
    _record(entry, store, manifest.name, seconds, report.num_rows, report.done)


def _record(
    entry: Entry, store: str | Path, manifest: str, seconds: float, rows: int, done: int
) -> None:
    """Say that a store is finished, and where it lies if not in the entry's folder."""
    place = {} if isinstance(store, Path) else {"store": store}
    entry.finish([manifest], seconds, rows=rows, done=done, **place)


def _exists(store: str | Path) -> bool:
    if isinstance(store, Path):
        return store.exists()
    from cache import locate

    return locate(store).exists()


def _take_over(where: Path, entry: Entry) -> bool:
    """Move a store of an earlier version, a folder in artifacts/, to its place."""
    if not where.is_dir() or where.is_symlink():
        return False
    entry.begin()
    where.rename(entry.folder / where.name)
    print(f"{where} is taken over into {entry.folder}")
    return True


def _keep_rows(entry: Entry, store: str | Path, name: str, table: Path) -> None:
    """Begin with the rows of a store which differs in its rows alone, or in where it lies."""
    from cache import begin_with_rows
    from corpora.caption_table import CaptionTable
    from stages.caption_rows import row_fingerprints

    for other in entry.work.entries(entry.kind):
        # Weights, dtype, layout and code alike: a row's key then says whether it can be kept.
        alike = {**other.decided_by, ROWS: None} == {**entry.decided_by, ROWS: None}
        source = _place_of(other, name)
        if not alike or source == store or not _exists(source):
            continue
        # Being filled now: its tables change while they are read.
        if other.key != entry.key and other.is_held():
            continue
        keys = row_fingerprints(CaptionTable(table))
        if kept := begin_with_rows(source, store, keys):
            place = other.folder if isinstance(source, Path) else source
            print(f"{entry.kind}: begins with {kept:,} rows of {place}")
            return


def _manifest(where: Path) -> Path:
    """artifacts/features.zarr -> artifacts/features.manifest.json."""
    return where.with_suffix(".manifest.json")
