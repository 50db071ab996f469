"""The forms in which captioned pictures come, and which of them a table is.

    TSV, CSV        a header with caption and image                     corpora.text_table
    JSON, JSONL     records with caption and image                      corpora.json_table
    Parquet         columns caption and image, paths or bytes           corpora.arrow_table
    `datasets`      saved to disk, or a hub id                          corpora.datasets_library
    tar, folders    KEY.jpg beside KEY.txt or KEY.json                  corpora.shard_samples

Files may be many, by a folder, a glob or braces; text and shards may be compressed by gzip. Tables
may also have the columns `id` and `split`. A new kind is a `CaptionSource` and a line in
`open_source`.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from pathlib import Path

from corpora.arrow_files import PARQUET, open_schema
from corpora.arrow_table import ArrowTable
from corpora.caption_params import CaptionParams
from corpora.columns import has_columns
from corpora.datasets_library import is_hub_id, is_saved, open_from_hub, open_saved
from corpora.json_table import JsonTable
from corpora.records import SPLIT_NAMES, CaptionTableError
from corpora.shard_samples import PictureFolder, TarShards
from corpora.source_rows import CaptionSource
from corpora.text_table import TextTable

_JSON = (".jsonl", ".json", ".ndjson")
_TEXT = (".tsv", ".csv", ".txt", ".tab")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def open_source(params: CaptionParams, unpacked: Path | None = None) -> CaptionSource:
    """The source behind `params.table`; `unpacked` is a folder for shards that are compressed.

    `params.images_dir` is what a table's `image` column is relative to: the table's own folder
    unless given. Shards and folders hold their pictures themselves.

    Raises:
        CaptionTableError: nothing there, an unknown form, or a table without the columns.
    """
    at_home = {
        name: os.path.expanduser(path)
        for name, path in (("table", params.table), ("images_dir", params.images_dir))
        if path is not None
    }
    params = params.model_copy(update=at_home)
    table = params.table
    if params.images_dir is not None and not os.path.isdir(params.images_dir):
        raise CaptionTableError(f"{table}: images_dir {params.images_dir} is not a folder")
    if os.path.isdir(table):
        return _open_folder(params, unpacked)
    files = _files(table)
    if not files:
        if table.lower().endswith(".tar"):
            raise CaptionTableError(f"{table}: no tar shards there")
        if is_hub_id(table) and not table.lower().endswith((*_TEXT, *_JSON, *PARQUET, ".gz")):
            return open_from_hub(params)
        raise CaptionTableError(f"{table}: no such caption table")
    return _open_files(params, files, unpacked)


def _open_files(
    params: CaptionParams,
    files: list[str],
    unpacked: Path | None,
    splits: dict[str, str] | None = None,
) -> CaptionSource:
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise CaptionTableError(
            f"{params.table}: files of several kinds: {', '.join(sorted(kinds))}; name those of one"
        )
    kind = kinds.pop()
    if kind == "tar":
        _without_images_dir(params, "tar shards hold")
        return TarShards(params, files, unpacked)
    if kind == "parquet":
        return ArrowTable(params, files, splits)
    return (JsonTable if kind == "json" else TextTable)(params, files, splits)


def _kind(file: str) -> str:
    name = file.lower().removesuffix(".gz")
    if name.endswith((".tar", ".tgz")):
        return "tar"
    if name.endswith((*PARQUET, ".arrow", ".feather")):
        return "parquet"
    return "json" if name.endswith(_JSON) else "text"


def _open_folder(params: CaptionParams, unpacked: Path | None) -> CaptionSource:
    """A folder by what lies in it, the more certain signs first."""
    folder = params.table
    if is_saved(folder):
        return open_saved(params)

    def below(*patterns: str) -> list[str]:
        inside = (os.path.join(glob.escape(folder), pattern) for pattern in patterns)
        return sorted(set(itertools.chain(*map(glob.glob, inside))))

    if shards := below("*.tar", "*.tar.gz", "*.tgz"):
        return _open_files(params, shards, unpacked)
    described = below("metadata.*", "*/metadata.*")
    described = [file for file in described if file.endswith((*_JSON, ".csv", *PARQUET))]
    if described:
        return _open_files(params, described, unpacked, _named_splits(described))
    parts = below("*.parquet", "*.pq", "*/*.parquet")
    if parts and has_columns(open_schema(parts[0])[0].names, params.columns):
        return _open_files(params, parts, unpacked, _named_splits(parts))
    if PictureFolder.fits(folder):
        _without_images_dir(params, "a folder of pictures holds")
        return PictureFolder(params, folder)
    if parts:
        return _open_files(params, parts, unpacked)
    if tables := below(*(f"*{suffix}" for suffix in (*_TEXT, *_JSON))):
        raise CaptionTableError(f"{folder}: a folder; name the table in it: {tables[0]}?")
    raise CaptionTableError(
        f"{folder}: no tar shards there, nor Parquet with captions and images, metadata.jsonl, or "
        "pictures with a .txt or .json of the same name beside them"
    )


def _named_splits(files: list[str]) -> dict[str, str]:
    """The split of files as the hub's are laid out: test/metadata.jsonl, test-00000-of-00002.*"""
    splits = {}
    for file in files:
        folder, name = os.path.split(file)
        for said in (re.split(r"[-_.]", name)[0], os.path.basename(folder)):
            if said.lower() in SPLIT_NAMES:
                splits[file] = said
                break
    return splits


def _without_images_dir(params: CaptionParams, who: str) -> None:
    if params.images_dir is not None:
        raise CaptionTableError(
            f"{params.table}: images_dir is {params.images_dir}, but {who} their own pictures"
        )


def _files(table: str) -> list[str]:
    """The file of this name, or those that a glob or braces mean, in order.

    Raises CaptionTableError: braces name a file that is not there.
    """
    if os.path.isfile(table):
        return [table]
    named = _expanded(table)
    found: list[str] = []
    for name in named:
        files = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        absent = [file for file in files if not os.path.isfile(file)]
        if len(named) > 1 and absent:
            raise CaptionTableError(f"{table}: {absent[0]} is missing")
        found += [file for file in files if file not in absent]
    return found


def _expanded(name: str) -> list[str]:
    """{00..12} and {a,b} written out, as shells and webdataset do."""
    braces = _BRACES.search(name)
    if braces is None:
        return [name]
    if braces[3] is not None:
        choices = braces[3].split(",")
    else:
        first, last = int(braces[1]), int(braces[2])
        step = 1 if first <= last else -1
        width = len(braces[1]) if braces[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    before, after = name[: braces.start()], name[braces.end() :]
    return [before + choice + rest for choice in choices for rest in _expanded(after)]
