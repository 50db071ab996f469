"""Where a table's pictures are: inside one folder, under the name that is meant.

Tables are written on other machines than they are read on: with backslashes, as file:// addresses,
with escaped or decomposed letters, in another case. A file of exactly the written name goes first.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Collection
from functools import lru_cache
from urllib.parse import unquote

from corpora.references import is_file_address, split_reference

_MAX_FOLDERS = 1024
_MAX_HINTS = 20


class PicturePaths:
    """Paths below `root`, `/`-separated. `own` are files of the source itself, which hold pictures
    and may lie elsewhere."""

    def __init__(self, root: str, *, allow_outside: bool, own: Collection[str] = ()) -> None:
        self.root = root
        self._allow_outside = allow_outside
        self._own = {os.path.abspath(file) for file in own}
        # Both, as what is written may have been found by either.
        self._roots = [os.path.abspath(root), os.path.realpath(root)]
        self._listing = lru_cache(_MAX_FOLDERS)(_listing)
        self._hints = 0
        self.outside_folder: str | None = None
        """The folder that the names which lead out of the root share, but for stray ones."""

    def inside(self, image: str) -> str | None:
        """The path relative to the root; None where it leads out of it and may not."""
        if is_file_address(image):
            image = unquote(image[7:].removeprefix("localhost"))
        container = split_reference(image)
        path, place = container or (image, "")
        path = os.path.normpath(path)
        if os.path.isabs(path) or path.split(os.sep, 1)[0] == "..":
            whole = os.path.normpath(os.path.join(self._roots[0], path))
            for root in self._roots:
                if whole.startswith(root.rstrip(os.sep) + os.sep):
                    path = whole[len(root.rstrip(os.sep)) + 1 :]
                    break
            else:
                if not (self._allow_outside or (container and whole in self._own)):
                    folder = os.path.dirname(whole)
                    shared = os.path.commonpath([self.outside_folder or folder, folder])
                    if shared != os.sep:
                        self.outside_folder = shared
                    return None
        return f"{path}#{place}" if container else path

    def find(self, image: str) -> str | None:
        """The one file that is meant by a name which no file has; None for none or several."""
        if split_reference(image) is not None:
            return None
        found = {path for spelling in _spellings(image) for path in self._matches(spelling)}
        return found.pop() if len(found) == 1 else None

    def hint(self, image: str) -> str:
        """What a missing picture may be; "" for no idea, or after enough hints."""
        if self._hints >= _MAX_HINTS or split_reference(image) is not None:
            return ""
        self._hints += 1
        found = sorted({path for each in _spellings(image) for path in self._matches(each)})
        if found:
            return f"; could be {' or '.join(found)}"
        folder, _, name = _spellings(image)[-1].rpartition("/")
        names = self._listing(os.path.join(self.root, folder))
        if not names:
            return "" if os.path.isdir(os.path.join(self.root, folder)) else f"; no folder {folder}"
        near = difflib.get_close_matches(_folded(name), list(names)[:20_000], 1, 0.75)
        return f"; near: {os.path.join(folder, names[near[0]][0])}" if near else ""

    def _matches(self, spelling: str) -> list[str]:
        """Paths of files below the root whose every part is so named, or alike."""
        placed = self.inside(spelling)
        if placed is None:
            return []
        start = "/" if placed.startswith("/") else ""
        folders = [start]
        parts = [part for part in placed.split("/") if part]
        for part in parts:
            found = []
            for folder in folders:
                names = self._listing(os.path.join(self.root, folder)).get(_folded(part), [])
                exact = [part] if part in names else names
                found += [os.path.join(folder, name) for name in exact]
            folders = found[:16]
        return [path for path in folders if os.path.isfile(os.path.join(self.root, path))]


def _spellings(image: str) -> list[str]:
    """The name as it is, and with what other programs put into names taken out, step by step."""
    spellings = [image]
    bare = image.strip("\"'").strip()
    for step in (
        bare,
        bare.replace("\\", "/"),
        unquote(bare.replace("\\", "/")),
        os.path.expanduser(unquote(bare.replace("\\", "/"))),
    ):
        if step and step not in spellings:
            spellings.append(step)
    return spellings


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _listing(folder: str) -> dict[str, list[str]]:
    """The names in a folder by what stays of them without case and composition."""
    names: dict[str, list[str]] = {}
    try:
        for name in os.listdir(folder or "."):
            names.setdefault(_folded(name), []).append(name)
    except OSError:
        pass
    return names
