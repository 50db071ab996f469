"""Pictures of answers as files: every answer, or talk, has a new folder; nothing is overwritten.

answer/001/00.png  answer/001/01.png  answer/002/00.png ...
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gill_errors import InputError
from gill_files import explained

if TYPE_CHECKING:
    from PIL import Image


class AnswerFolder:
    """A folder below `below` with the next free number, made when the first picture comes.

    Raises InputError, before any answer is made, where no folder can be made there.
    """

    def __init__(self, below: Path) -> None:
        there = next(path for path in (below, *below.absolute().parents) if path.exists())
        if not there.is_dir():
            raise InputError(f"{there} is a file: name a folder, in which each answer gets its own")
        if not os.access(there, os.W_OK):
            raise InputError(f"{there} cannot be written to: name another folder")
        self._below = below
        self._folder: Path | None = None
        self._count = 0

    def save(self, picture: Image.Image) -> Path:
        """Write the picture; gives its path. Raises WriteFailedError where that cannot be."""
        from pipeline.frozen.provenance import png_chunks

        with explained(self._below):
            if self._folder is None:
                self._folder = _new_folder(self._below)
            path = self._folder / f"{self._count:02d}.png"
            picture.save(path, pnginfo=png_chunks(picture))
        self._count += 1
        return path


def _new_folder(below: Path) -> Path:
    below.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in below.iterdir() if path.name.isdecimal()]
    number = max(numbers, default=0) + 1
    while True:  # another answer may take the number at the same moment
        folder = below / f"{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
