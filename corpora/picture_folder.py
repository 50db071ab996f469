"""Finds the pictures of a data set whose annotations name them by id, not by file."""

import os
import re
from pathlib import Path

from corpora.caption_params import MAX_PIXELS, CheckLevel
from corpora.pictures import PICTURE_SUFFIXES, PictureError, check_picture
from corpora.records import CorpusError

_NUMBER = re.compile(r"\d+$")


class PictureFolder:
    """A folder of pictures and the folders in it, listed once; each picture that is asked for is
    checked once. Of several that fit, the one nearest to the top is taken.

    Raises CorpusError if there is no such folder.
    """

    def __init__(
        self, folder: str | Path, check: CheckLevel = "header", max_pixels: int = MAX_PIXELS
    ) -> None:
        self._folder = str(folder)
        self._check = check
        self._max_pixels = max_pixels
        self._checked: dict[str, PictureError | None] = {}
        self._by_name: dict[str, str] = {}
        self._by_folded: dict[str, str | None] = {}  # None: several
        self._by_stem: dict[str, str] = {}
        self._by_number: dict[int, str] = {}
        if not os.path.isdir(folder):
            raise CorpusError(f"{folder}: no such folder of pictures")
        seen: set[str] = set()  # a link may lead to a folder above it
        for parent, folders, names in os.walk(folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix[1:].lower() in PICTURE_SUFFIXES:
                    path = os.path.relpath(os.path.join(parent, name), folder)
                    self._by_name.setdefault(name, path)
                    low = name.casefold()
                    self._by_folded[low] = None if low in self._by_folded else path
                    self._by_stem.setdefault(stem, path)
                    if number := _NUMBER.search(stem):
                        self._by_number.setdefault(int(number[0]), path)

    def with_coco_name(self, name: str, id_: str) -> str:
        """The path of a picture that COCO annotations call `name`, wherever below the folder it
        lies. Where there is no such file but the name ends in the image id in 12 digits, as all of
        COCO's do, the picture whose name ends so too: the 2014 annotations then fit a folder of the
        2017 release. Raises PictureError."""
        path = os.path.normpath(name.replace("\\", "/"))
        if os.path.isabs(path) or path.split(os.sep)[0] == "..":
            raise PictureError("missing", f"{name} leads out of {self._folder}")
        if not os.path.exists(os.path.join(self._folder, path)):
            base = os.path.basename(path)
            path = self._by_name.get(base) or self._by_folded.get(base.casefold()) or path
        if not os.path.exists(os.path.join(self._folder, path)) and id_.isdecimal():
            ending = f"{int(id_):012d}"
            other = self._by_number.get(int(id_), "")
            if all(Path(each).stem.endswith(ending) for each in (path, other)):
                path = other
        return self._good(path, path)

    def with_stem(self, stem: str) -> str:
        """The path of STEM.jpg, STEM.png, ... Raises PictureError."""
        return self._good(self._by_stem.get(stem), f"{stem}.*")

    def with_id(self, id_: str) -> str:
        """The path of the picture whose name ends in a number, as COCO's do in every release:
        42 finds COCO_val2014_000000000042.jpg and 000000000042.jpg; the picture of that name, where
        the id is no number. Raises PictureError."""
        if not id_.isdecimal():
            return self.with_stem(id_)
        return self._good(self._by_number.get(int(id_)), f"*{int(id_):012d}.*")

    def _good(self, name: str | None, wanted: str) -> str:
        if name is None:
            raise PictureError("missing", f"no {wanted} in {self._folder}")
        path = os.path.join(self._folder, name)
        if path not in self._checked:
            try:
                check_picture(path, self._check, self._max_pixels)
                self._checked[path] = None
            except PictureError as error:
                self._checked[path] = error
        error_ = self._checked[path]
        if error_ is not None:
            raise PictureError(error_.kind, error_.detail, error_.reference)
        return path
