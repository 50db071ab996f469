"""Which column of a table holds the caption, the picture, the id and the split."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from corpora.caption_params import ColumnParams
from corpora.records import CaptionTableError

NAMES = {
    "caption": ("caption", "captions", "text", "title", "txt"),
    "image": ("image", "image_path", "filepath", "file_name", "path", "jpg", "png", "webp"),
    "id": ("id",),
    "split": ("split",),
}
"""What a column is called, in any case and with or without underscores; the first goes before the
others, and of the others there may be one."""
_HINTS = {
    "caption": ("descr", "label", "prompt"),
    "image": ("img", "file", "photo", "pic"),
}


class Columns(NamedTuple):
    """The columns' names as the table spells them."""

    caption: str
    image: str
    id: str | None
    split: str | None


def find_columns(file: str, header: Sequence[str], params: ColumnParams) -> Columns:
    """The columns of a table with this header.

    Raises CaptionTableError: a needed column is absent, or several could be it; with the header,
    the nearest guess and the setting.
    """
    return Columns(
        _needed(file, header, "caption", params.caption),
        _needed(file, header, "image", params.image),
        _optional(file, header, "id", params.id),
        _optional(file, header, "split", params.split),
    )


def has_columns(header: Sequence[str], params: ColumnParams) -> bool:
    """Whether a header has a caption and an image."""
    return all(_fitting(header, role, getattr(params, role)) for role in ("caption", "image"))


def ignored_columns(header: Sequence[str], columns: Columns) -> tuple[str, ...]:
    """The columns that nobody reads."""
    return tuple(name for name in header if name not in columns)


def _needed(file: str, header: Sequence[str], role: str, given: str | None) -> str:
    name = _optional(file, header, role, given)
    if name is not None:
        return name
    near = _nearest(header, role)
    guess = f", perhaps captions.columns.{role}: {near}" if near else ""
    raise CaptionTableError(
        f"{file}: no column {role}; it has {', '.join(header)[:200]}. Taken for it: "
        f"{', '.join(NAMES[role])}; captions.columns.{role} names another{guess}"
    )


def _optional(file: str, header: Sequence[str], role: str, given: str | None) -> str | None:
    fitting = _fitting(header, role, given)
    if given is not None and not fitting:
        near = difflib.get_close_matches(given, header, 1)
        guess = f"; nearest: {near[0]}" if near else ""
        raise CaptionTableError(
            f"{file}: captions.columns.{role} is {given}, but it has {', '.join(header)[:200]}"
            f"{guess}"
        )
    if len({_plain(name) for name in fitting}) < len(fitting):
        raise CaptionTableError(f"{file}: column {fitting[0].strip()} is there more than once")
    if len(fitting) > 1:
        raise CaptionTableError(
            f"{file}: {' and '.join(fitting)} could each be the {role}: set captions.columns.{role}"
        )
    return fitting[0] if fitting else None


def _fitting(header: Sequence[str], role: str, given: str | None) -> list[str]:
    """All columns that could be it."""
    if given is not None:
        exact = [name for name in header if name.strip() == given.strip()]
        return exact or [name for name in header if _plain(name) == _plain(given)]
    first, *others = map(_plain, NAMES[role])
    return [name for name in header if _plain(name) == first] or [
        name for name in header if _plain(name) in others
    ]


def _plain(name: str) -> str:
    return "".join(one for one in name.casefold() if one not in " _-")


def _nearest(header: Sequence[str], role: str) -> str | None:
    spellings = {name.casefold(): name for name in header}
    for known in (*NAMES[role], *_HINTS[role]):
        inside = [name for low, name in spellings.items() if known in low]
        if near := inside or difflib.get_close_matches(known, list(spellings), 1, 0.7):
            return spellings.get(near[0], near[0])
    return None
