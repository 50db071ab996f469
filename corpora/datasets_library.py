"""Data sets of the library `datasets`: saved to disk, or named on the hub.

Both are Arrow files in the end. Those on disk are found without the library.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from corpora.arrow_table import ArrowTable
from corpora.caption_params import CaptionParams
from corpora.json_files import read_json
from corpora.records import CaptionTableError

_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any(os.path.isfile(os.path.join(folder, n)) for n in ("dataset_dict.json", "state.json"))


def open_saved(params: CaptionParams) -> ArrowTable:
    """What `save_to_disk` wrote; its splits are the folders' names."""
    folder = params.table
    index = os.path.join(folder, "dataset_dict.json")
    if not os.path.isfile(index):
        return ArrowTable(params, _files(folder))
    content = read_json(index)
    names = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(names, list):
        raise CaptionTableError(f"{index}: names no splits")
    splits = {file: str(name) for name in names for file in _files(os.path.join(folder, str(name)))}
    return ArrowTable(params, list(splits), splits)


def _files(folder: str) -> list[str]:
    state = read_json(os.path.join(folder, "state.json"))
    try:
        return [os.path.join(folder, file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise CaptionTableError(f"{folder}/state.json: names no data files") from error


def is_hub_id(table: str) -> bool:
    """Whether a name could be a data set of the hub."""
    return _ID.fullmatch(table) is not None


def open_from_hub(params: CaptionParams) -> ArrowTable:
    """A data set of the hub; fetched with `allow_download`, else as it lies in the library's cache.

    Raises CaptionTableError: not allowed and not there, or the library is absent.
    """
    name = params.table
    if importlib.util.find_spec("datasets") is None:
        raise CaptionTableError(
            f"{name}: no such caption table; as a data set of the hub it needs "
            "pip install 'gill[datasets]'"
        )
    import datasets  # type: ignore[import-not-found, unused-ignore]
    from huggingface_hub import constants

    try:
        # The library's own `local_files_only` is no longer heeded by its requests to the hub.
        with nullcontext() if params.allow_download else _offline(datasets.config, constants):
            loaded = datasets.load_dataset(name)
    except Exception as error:  # the library raises whatever it stumbles over
        hint = "" if params.allow_download else "; captions.allow_download: true fetches it"
        raise CaptionTableError(
            f"{name}: no such caption table here, and as a data set of the hub: {error}{hint}"
        ) from error
    splits = {
        file["filename"]: split for split, part in loaded.items() for file in part.cache_files
    }
    if (
        params.images_dir is None
    ):  # of a folder of pictures, the pictures lie in the hub's own cache
        caches = [datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
        shared = os.path.commonpath([*map(os.path.abspath, caches), *splits])
        if shared != os.sep:
            params = params.model_copy(update={"images_dir": shared})
    return ArrowTable(params, list(splits), splits if len(loaded) > 1 else None)


@contextmanager
def _offline(*libraries: Any) -> Iterator[None]:
    before = [library.HF_HUB_OFFLINE for library in libraries]
    try:
        for library in libraries:
            library.HF_HUB_OFFLINE = True
        yield
    finally:
        for library, offline in zip(libraries, before):
            library.HF_HUB_OFFLINE = offline
