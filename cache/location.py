"""Where a store lies: a folder on this machine, or an fsspec URL (`s3://`, `gs://`, `memory://`,
...)."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import zarr.abc.store
from fsspec.implementations.local import LocalFileSystem
from zarr.storage import FsspecStore, LocalStore

from gill_errors import GillError, InputError
from gill_files import PARTIAL_SUFFIX, force_to_disk, remove_partial_files, written_whole

OWN_DISK = (errno.ENOSPC, errno.EDQUOT)  # what no object store says


class StoreUnreachableError(GillError, OSError):
    """An object store does not answer, or answers with an error: nothing is known of the rows."""


@dataclass(frozen=True)
class Location:
    """One place that can hold a Zarr store, and small text files beside it.

    `url` is an absolute path for a local folder, and a URL with its scheme otherwise.
    """

    url: str
    is_local: bool

    @property
    def path(self) -> Path:
        """The local folder. Raises InputError where it is none."""
        if not self.is_local:
            raise InputError(f"{self.url} is not a local folder")
        return Path(self.url)

    def beside(self, suffix: str) -> Location:
        """`data/targets.zarr` and `.manifest.json` -> `data/targets.manifest.json`."""
        return Location(self.url.removesuffix(".zarr") + suffix, self.is_local)

    def zarr_store(self, *, read_only: bool) -> zarr.abc.store.Store:
        """The place as Zarr opens it."""
        if self.is_local:
            return LocalStore(self.path, read_only=read_only)
        # s3fs asks for the size of whatever it reads whole, to read it in parts that come together:
        # a request more for each of the small tables.
        options = {"max_concurrency": 1} if read_only and self.url.startswith("s3://") else None
        return FsspecStore.from_url(self.url, read_only=read_only, storage_options=options)

    def exists(self) -> bool:
        """True where a file, or a folder with more than half-written files in it, lies here."""
        return not all(name.endswith(PARTIAL_SUFFIX) for name in self.children())

    def read_text(self) -> str | None:
        """The text of this file; None where there is none."""
        fs, path = self._fs()
        try:
            with self.reached():
                return fs.cat_file(path).decode()
        except FileNotFoundError:
            return None

    def download(self, target: Path, *inside: str) -> None:
        """Write the file named `inside` this folder to the local path `target`.

        Raises FileNotFoundError where there is none, StoreUnreachableError, or OSError with the
        errno of `target`'s disk.
        """
        if self.is_local:
            shutil.copyfile(self.path.joinpath(*inside), target)
            return
        fs, path = self._fs(*inside)
        with self.reached(*inside):
            fs.get_file(path, str(target))

    @contextmanager
    def reached(self, *inside: str, writing: bool = False) -> Iterator[None]:
        """Say which object cannot be had from an object store, and that no row is to blame.

        writing: what the operating system says of a write is left to `explained`.

        The file system's library has tried several times by then (s3fs: five times, waiting from
        0.1 to 1 s, each of up to five requests).
        """
        try:
            yield
        # What Zarr raises where bytes are there and wrong is left to who knows the rows.
        except (GillError, FileNotFoundError, FileExistsError):
            raise
        except (ValueError, RuntimeError, MemoryError):
            raise
        except Exception as error:
            if self.is_local or getattr(error, "errno", None) in OWN_DISK:
                raise
            if writing and isinstance(error, OSError):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StoreUnreachableError(
                f"{'/'.join([self.url, *inside])} cannot be {'written' if writing else 'read'} "
                f"({reason}): nothing is damaged by that; see that the store answers, and run again"
            ) from error

    def write_text(self, text: str) -> None:
        """Write this file whole or not at all."""
        self.write_bytes([text.encode()])

    def write_bytes(self, content: Sequence[bytes | memoryview], *inside: str) -> None:
        """Write pieces as this file, or the one named `inside` this folder, whole or not at all.

        It is on the disk afterwards: what is recorded next, a power cut does not make untrue.
        """
        if self.is_local:
            file_path = self.path.joinpath(*inside)
            with written_whole(file_path) as partial:
                with partial.open("wb") as file:
                    file.writelines(content)
                force_to_disk(partial)
            force_to_disk(file_path.parent)
        else:
            fs, path = self._fs(*inside)
            fs.pipe_file(path, b"".join(content))

    def create_text(self, text: str) -> None:
        """Write this file; raises FileExistsError where it exists already."""
        fs, path = self._fs()
        with self.reached(writing=True), fs.open(path, "xb") as f:
            f.write(text.encode())

    def remove(self, *inside: str) -> None:
        """Remove this file or folder, or the one named `inside` it, if it exists."""
        fs, path = self._fs(*inside)
        if fs.exists(path):
            fs.rm(path, recursive=True)

    def children(self) -> list[str]:
        """Names of what lies directly in this folder, sorted; of a file its own."""
        fs, path = self._fs()
        with self.reached():
            if not fs.exists(path):
                return []
            names = fs.ls(path, detail=False)
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in names)

    def bytes_stored(self, *inside: str) -> tuple[int, int]:
        """Bytes and number of files under the folder named `inside` this one."""
        fs, path = self._fs(*inside)
        sizes = [entry["size"] for entry in fs.find(path, detail=True).values()]
        return sum(sizes), len(sizes)

    def remove_partial_files(self) -> None:
        """Remove what a killed writer left half-written."""
        if self.is_local:  # an object store shows an object whole or not at all
            remove_partial_files(self.path)

    def _fs(self, *inside: str) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, path = (
            (LocalFileSystem(), self.url) if self.is_local else fsspec.core.url_to_fs(self.url)
        )
        fs.invalidate_cache()  # other processes write here too
        return fs, "/".join([path, *inside])

    def __str__(self) -> str:
        return self.url


def locate(where: str | Path | Location) -> Location:
    """`artifacts/targets.zarr`, `file:///data/targets.zarr`, `s3://bucket/targets.zarr`, ...

    A symbolic link may lead to a URL. Raises InputError where nothing installed speaks its scheme.
    """
    if isinstance(where, Location):
        return where
    text = str(where)
    if "://" not in text and os.path.islink(text) and "://" in (link := os.readlink(text)):
        text = link
    text = text.removeprefix("file://")
    if "://" in text:
        try:
            fsspec.get_filesystem_class(text.partition("://")[0])
        except (ImportError, ValueError) as error:
            raise InputError(f"{text} cannot be reached from here: {error}") from None
        return Location(text.rstrip("/"), is_local=False)
    return Location(os.path.abspath(text), is_local=True)
