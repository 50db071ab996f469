"""Files that are written whole or not at all, and links in place of copies."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gill_errors import GillError, WriteFailedError

PARTIAL_SUFFIX = ".partial"  # as zarr's local store calls what is not yet renamed into place


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place in one step when the block ends well.

    A reader sees the old file or the new one, and after an error the old one stays. A killed
    process leaves the new one behind: `remove_partial_files` takes it away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed writers left half-written in a folder that nobody writes to now."""
    for partial in folder.rglob(f"*{PARTIAL_SUFFIX}"):
        partial.unlink()


def force_to_disk(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk: after this a power cut spares them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_of(path: Path, algorithm: str = "sha256") -> str:
    """The hash of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(
            stream, lambda: hashlib.new(algorithm, usedforsecurity=False)
        ).hexdigest()


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for the bytes of a file; a copy where the file system has no hard links.

    Whoever writes such a file must replace it whole, so that neither name changes the other.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def explained(where: object) -> Iterator[None]:
    """Say what it is that the operating system does not let us write, and what to do about it."""
    try:
        yield
    except (GillError, FileExistsError):
        raise
    except OSError as error:
        raise WriteFailedError(
            error.errno,
            f"{where} cannot be written ({error.strerror or error}): make room or give "
            "permission, and run again. What is done stays done",
        ) from error
