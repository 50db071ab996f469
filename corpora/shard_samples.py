"""Samples of webdataset tar shards, and of folders in the same layout: a picture and, beside it
under the same key, its caption in a .txt, .caption or .json.

In a shard the key is the name up to the first dot of its last part, as webdataset says.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from corpora import tar_shards
from corpora.caption_params import CaptionParams
from corpora.columns import NAMES
from corpora.pictures import PICTURE_SUFFIXES
from corpora.records import CaptionTableError, Exclusion
from corpora.references import inside
from corpora.source_rows import MAX_LINE_BYTES, CaptionSource, Record
from gill_errors import InputError

_TEXTS = ("txt", "caption")
_RECORD = "json"
_PACKED = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)


class TarShards(CaptionSource):
    """Tar files that hold their pictures themselves. Those that gzip has compressed are unpacked
    once, into `unpacked`: pictures are read at random.

    Raises CaptionTableError where there is no such folder, or what is in one is no gzip.
    """

    def __init__(self, params: CaptionParams, shards: list[str], unpacked: Path | None) -> None:
        super().__init__(params)
        self.files = shards
        self._plain = {shard: _plain(shard, unpacked) for shard in shards}
        folders = [os.path.dirname(plain) or "." for plain in self._plain.values()]
        if len({os.path.isabs(folder) for folder in folders}) > 1:
            folders = [os.path.abspath(folder) for folder in folders]
        self.root = os.path.commonpath(folders)
        self._folder = os.path.commonpath([os.path.dirname(shard) or "." for shard in shards])
        self._size = max(sum(map(os.path.getsize, self._plain.values())), 1)
        self._done = 0

    def fraction(self) -> float:
        """How much of the shards has been read, from 0 to 1."""
        return min(self._done / self._size, 1.0)

    def records(self) -> Iterator[Record | Exclusion]:
        """Samples of all shards, in order."""
        before = 0
        for shard, plain in self._plain.items():
            try:
                scan = tar_shards.scan(plain)
            except (OSError, tar_shards.ShardError) as error:
                yield Exclusion(shard, "1", "unreadable shard", str(error))
                scan = tar_shards.Scan([], None)
            samples = _samples(scan.members)
            for number, (key, parts) in enumerate(samples.items(), 1):
                self._done = before + max(part.offset for part in parts)
                yield self._sample(shard, number, key, parts)
            if scan.damage is not None:
                yield Exclusion(shard, str(len(samples) + 1), "damaged shard", scan.damage)
            before += os.path.getsize(plain)
            self._done = before

    def _sample(
        self, shard: str, number: int, key: str, parts: list[tar_shards.Member]
    ) -> Record | Exclusion:
        def excluded(reason: str, detail: str) -> Exclusion:
            return Exclusion(shard, str(number), reason, f"{key}: {detail}")

        plain = self._plain[shard]

        path = PurePosixPath(key)
        if path.is_absolute() or ".." in path.parts:
            return excluded("unsafe member name", "absolute, or with ..")
        by_suffix: dict[str, tar_shards.Member] = {}
        for part in parts:
            suffix = part.name[len(key) + 1 :].lower()
            if suffix in by_suffix:
                return excluded("duplicate id", f"several members {part.name}")
            by_suffix[suffix] = part
        pictures = [
            part
            for suffix, part in by_suffix.items()
            if suffix.rpartition(".")[2] in PICTURE_SUFFIXES
        ]
        if len(pictures) > 1:
            names = ", ".join(part.name for part in pictures[:5])
            return excluded("several images", f"one key, up to the first dot, of {names}")
        if not pictures:
            return excluded("no image", ", ".join(part.name for part in parts[:5]))

        def read(suffix: str) -> bytes:
            part = by_suffix[suffix]
            if part.size > MAX_LINE_BYTES:
                raise InputError(f"{part.name} has {part.size} bytes")
            return tar_shards.read(plain, tar_shards.Location(part.offset, part.size, ""))

        try:
            captions = _captions(by_suffix, read, self.params.columns.caption)
        except (ValueError, RecursionError) as error:
            return excluded("unreadable caption", str(error))
        image = inside(os.path.relpath(plain, self.root), pictures[0].name)
        name = _PACKED.sub("", os.path.relpath(shard, self._folder))
        return Record(shard, number, image, captions, f"{name}/{key}", None)


class PictureFolder(CaptionSource):
    """A folder of pictures with their captions beside them, and the folders in it."""

    def __init__(self, params: CaptionParams, folder: str) -> None:
        super().__init__(params)
        self.root, self.files = folder, []
        self._samples: dict[str, dict[str, list[str]]] = {}
        for parent, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                suffix = suffix[1:].lower()
                if name.startswith(".") or suffix not in {*PICTURE_SUFFIXES, *_TEXTS, _RECORD}:
                    continue
                if name.endswith("_stats.json"):  # img2dataset's account of a shard
                    continue
                path = os.path.relpath(os.path.join(parent, name), folder)
                key = os.path.join(os.path.dirname(path), stem)
                self._samples.setdefault(key, {}).setdefault(suffix, []).append(path)
        self._done = 0

    @staticmethod
    def fits(folder: str) -> bool:
        """Whether a picture there has a caption beside it."""
        for _, _, names in os.walk(folder):
            stems: dict[str, set[bool]] = {}
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix[1:].lower() in {*PICTURE_SUFFIXES, *_TEXTS, _RECORD}:
                    stems.setdefault(stem, set()).add(suffix[1:].lower() in PICTURE_SUFFIXES)
            if any(len(kinds) == 2 for kinds in stems.values()):
                return True
        return False

    def fraction(self) -> float:
        """How much of the folder has been read, from 0 to 1."""
        return self._done / max(len(self._samples), 1)

    def records(self) -> Iterator[Record | Exclusion]:
        """Samples of the folder, in order."""
        for number, (key, parts) in enumerate(self._samples.items(), 1):
            self._done = number
            pictures = [p for suffix in parts if suffix in PICTURE_SUFFIXES for p in parts[suffix]]
            if len(pictures) != 1:
                reason = "several images" if pictures else "no image"
                names = ", ".join(p for paths in parts.values() for p in paths)
                yield Exclusion(self.root, str(number), reason, f"{key}: {names}")
                continue
            try:
                captions = _captions(parts, self._reader(parts), self.params.columns.caption)
            except (OSError, ValueError, RecursionError) as error:
                yield Exclusion(self.root, str(number), "unreadable caption", f"{key}: {error}")
                continue
            yield Record(self.root, number, pictures[0], captions, key, None)

    def _reader(self, parts: dict[str, list[str]]) -> Callable[[str], bytes]:
        def read(suffix: str) -> bytes:
            path = os.path.join(self.root, parts[suffix][0])
            if os.path.getsize(path) > MAX_LINE_BYTES:
                raise InputError(f"{path} has {os.path.getsize(path)} bytes")
            with open(path, "rb") as file:
                return file.read()

        return read


def _plain(shard: str, unpacked: Path | None) -> str:
    """The shard itself, or what it is without gzip; made anew when the shard changes."""
    if shard.lower().endswith(".tar"):
        return shard
    if unpacked is None:
        raise CaptionTableError(f"{shard}: compressed, and there is no folder to unpack it into")
    status = os.stat(shard)
    version = f"{os.path.abspath(shard)} {status.st_size} {status.st_mtime_ns}"
    name = hashlib.blake2b(version.encode(), digest_size=8).hexdigest()
    target = unpacked / f"{name}.tar"
    if not target.is_file():
        unpacked.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        try:
            with gzip.open(shard) as packed, partial.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 2**20)
            os.replace(partial, target)
        except (OSError, EOFError) as error:
            raise CaptionTableError(f"{shard}: cannot be unpacked ({error})") from error
        finally:
            partial.unlink(missing_ok=True)
    return str(target)


def _samples(members: list[tar_shards.Member]) -> dict[str, list[tar_shards.Member]]:
    """Members by key, in file order."""
    samples: dict[str, list[tar_shards.Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        if stem and dot:  # a hidden file, or one without a suffix, is no part of a sample
            samples.setdefault(f"{folder}{slash}{stem}", []).append(member)
    return samples


def _captions(
    parts: Mapping[str, Any], read: Callable[[str], bytes], column: str | None
) -> list[str]:
    """The text of the first part that has any; of a .json the key of a caption, one or a list.

    Raises ValueError: not UTF-8, or not JSON.
    """
    for suffix in _TEXTS if column is None else ():
        if suffix in parts and (text := read(suffix).decode("utf-8-sig")).strip():
            return [text]
    if _RECORD not in parts:
        return []
    record = json.loads(read(_RECORD).decode("utf-8-sig"))
    if not isinstance(record, dict):
        return []
    keys = [key for name in NAMES["caption"] for key in (name, f"{name}s")]
    for key in keys if column is None else [column]:
        value = record.get(key)
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return texts
    return []
