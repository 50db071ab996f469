"""Caption tables of samples: webdataset tar shards, as img2dataset writes them."""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import PurePosixPath

from corpora import tar_shards
from corpora.pictures import PICTURE_SUFFIXES
from corpora.records import Exclusion
from corpora.source_rows import MAX_LINE_BYTES, CaptionSource, CaptionTableError, SourceRow
from gill_errors import InputError


class TarSource(CaptionSource):
    def __init__(self, table: str) -> None:
        if os.path.isdir(table):
            found = glob.glob(os.path.join(glob.escape(table), "*.tar"))
        else:
            found = [table] if os.path.exists(table) else glob.glob(table)
        self._shards = sorted(shard for shard in found if os.path.isfile(shard))
        if not self._shards:
            raise CaptionTableError(f"{table}: no tar shards there")
        self.root = os.path.commonpath([os.path.dirname(shard) or "." for shard in self._shards])
        sizes = [os.path.getsize(shard) for shard in self._shards]
        self._size = max(sum(sizes), 1)
        self._done = 0

    def fraction(self) -> float:
        return min(self._done / self._size, 1.0)

    def __iter__(self) -> Iterator[SourceRow | Exclusion]:
        before = 0
        for shard in self._shards:
            try:
                scan = tar_shards.scan(shard)
            except (OSError, tar_shards.ShardError) as error:
                yield Exclusion(shard, "1", "unreadable shard", str(error))
                scan = tar_shards.Scan([], None)
            samples = _samples(scan.members)
            for number, (key, parts) in enumerate(samples.items(), 1):
                self._done = before + max(part.offset for part in parts)
                yield self._sample(shard, number, key, parts)
            if scan.damage is not None:
                yield Exclusion(shard, str(len(samples) + 1), "damaged shard", scan.damage)
            before += os.path.getsize(shard)
            self._done = before

    def _sample(
        self, shard: str, number: int, key: str, parts: list[tar_shards.Member]
    ) -> SourceRow | Exclusion:
        def excluded(reason: str, detail: str) -> Exclusion:
            return Exclusion(shard, str(number), reason, f"{key}: {detail}")

        path = PurePosixPath(key)
        if path.is_absolute() or ".." in path.parts:
            return excluded("unsafe member name", "absolute, or with ..")
        by_suffix: dict[str, tar_shards.Member] = {}
        for part in parts:
            suffix = part.name[len(key) + 1 :].lower()
            if suffix in by_suffix:
                return excluded("duplicate id", f"several members {part.name}")
            by_suffix[suffix] = part
        pictures = [by_suffix[suffix] for suffix in by_suffix if suffix in PICTURE_SUFFIXES]
        if len(pictures) != 1:
            return excluded("no image" if not pictures else "several images", f"{len(parts)} parts")
        try:
            caption = self._caption(shard, by_suffix)
        except (ValueError, RecursionError) as error:
            return excluded("unreadable caption", str(error))
        relative = os.path.relpath(shard, self.root)
        image = f"{relative}#{pictures[0].name}"
        return SourceRow(shard, number, image, caption, f"{relative[: -len('.tar')]}/{key}", None)

    @staticmethod
    def _caption(shard: str, by_suffix: dict[str, tar_shards.Member]) -> str:
        part = by_suffix.get("txt") or by_suffix.get("json")
        if part is None:
            return ""
        if part.size > MAX_LINE_BYTES:
            raise InputError(f"{part.name} has {part.size} bytes")
        text = tar_shards.read(shard, tar_shards.Location(part.offset, part.size, "")).decode()
        if "txt" in by_suffix:
            return text
        record = json.loads(text)
        caption = record.get("caption") if isinstance(record, dict) else None
        return caption if isinstance(caption, str) else ""


def _samples(members: list[tar_shards.Member]) -> dict[str, list[tar_shards.Member]]:
    """Members by key, in file order; a key is the name up to the first dot of its last part."""
    samples: dict[str, list[tar_shards.Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        if stem and dot:  # a hidden file, or one without a suffix, is no part of a sample
            samples.setdefault(f"{folder}{slash}{stem}", []).append(member)
    return samples
