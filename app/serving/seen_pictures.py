"""What is known of pictures that were sent before, by a hash of their files."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from corpora.pictures import open_picture
from pipeline.frozen.visual_encoder import VisualEncoder
from pipeline.talking.answers import ToldPart


@dataclass(frozen=True)
class SeenPicture:
    """A picture that decodes, to `pixels`; `vector` is its pooled vector [d], once encoded."""

    pixels: int
    vector: Tensor | None = None


class SeenPictures:
    """The last `max_pictures` that were asked about. Safe to use from several threads."""

    def __init__(self, max_pictures: int) -> None:
        self._max_pictures = max_pictures
        self._seen: OrderedDict[bytes, SeenPicture] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, file: bytes, max_pixels: int) -> SeenPicture:
        """What is known of the picture in `file`, which is decoded where nothing is.

        Raises PictureError where it is no picture, or larger.
        """
        known = self._get(_name(file))
        if known is None or known.pixels > max_pixels:
            picture = open_picture(file, max_pixels=max_pixels)
            known = SeenPicture(picture.width * picture.height)
            self._put(_name(file), known)
        return known

    def encode(self, parts: Sequence[ToldPart | bytes], encoder: VisualEncoder) -> list[ToldPart]:
        """The parts with every picture file as its vector; unknown ones are encoded in one go."""
        names = [_name(part) for part in parts if isinstance(part, bytes)]
        files = dict(zip(names, (part for part in parts if isinstance(part, bytes))))
        known = {name: self._get(name) for name in files}
        vectors = {
            name: one.vector for name, one in known.items() if one and one.vector is not None
        }
        if new := {name: open_picture(files[name]) for name in files if name not in vectors}:
            for (name, picture), vector in zip(
                new.items(), encoder.encode_pictures(list(new.values()))
            ):
                vectors[name] = vector
                self._put(name, SeenPicture(picture.width * picture.height, vector))
        given = iter(names)
        return [vectors[next(given)] if isinstance(part, bytes) else part for part in parts]

    def _get(self, name: bytes) -> SeenPicture | None:
        with self._lock:
            if name in self._seen:
                self._seen.move_to_end(name)
            return self._seen.get(name)

    def _put(self, name: bytes, picture: SeenPicture) -> None:
        with self._lock:
            self._seen[name] = picture
            self._seen.move_to_end(name)
            while len(self._seen) > self._max_pictures:
                self._seen.popitem(last=False)


def _name(file: bytes) -> bytes:
    return hashlib.blake2b(file, digest_size=16).digest()
