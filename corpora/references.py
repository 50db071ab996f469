"""How pictures are named: a path, a place in a container (`FILE#PLACE`), or an address."""

from __future__ import annotations

import re

_CONTAINED = re.compile(r"(.+?\.(?:tar|parquet|pq|arrow|feather))#(.+)", re.DOTALL | re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:|pipe:", re.IGNORECASE)


def is_url(reference: str) -> bool:
    """Whether a reference is an address rather than a path."""
    return ":" in reference and _URL.match(reference) is not None


def is_file_address(reference: str) -> bool:
    """Whether an address is that of a file here, file:///PATH."""
    return reference.startswith(("file://", "FILE://"))


def inside(file: str, place: str) -> str:
    """The reference to a member of a shard, or a cell of an Arrow or Parquet file."""
    return f"{file}#{place}"


def split_reference(reference: str) -> tuple[str, str] | None:
    """("a/0.tar", "k.jpg") of "a/0.tar#k.jpg"; None for a plain path."""
    match = _CONTAINED.fullmatch(reference) if "#" in reference else None
    return (match[1], match[2]) if match else None


def file_of(reference: str) -> str:
    """The file in which a picture lies."""
    contained = split_reference(reference)
    return reference if contained is None else contained[0]
