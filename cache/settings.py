"""What this room takes from a params file, apart from the code that obeys it; see also `Codec`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import ByteSize, Field

from gill_errors import InputError
from gill_records import Record


class FillingParams(Record):
    """How a store is filled: one task is one shard.

    What is stored does not depend on it, save rounding on batch_size.
    """

    batch_size: int = Field(default=64, ge=1, description="Rows per call of the encoder.")
    num_readers: int | None = Field(
        default=None,
        ge=1,
        description="Threads that read and decode rows; None: as many as there are cores.",
    )


@dataclass(frozen=True)
class Part:
    """A share of a store's shards, for one of several machines: neighbours, as equal as can be."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`3/8`: the third of eight."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"{text!r} is no part: write 3/8 for the third of eight")
        return cls(int(found[1]), int(found[2]))

    def shards(self, num_shards: int) -> range:
        """Which of them; none where there are fewer shards than parts."""
        return range(num_shards * (self.number - 1) // self.of, num_shards * self.number // self.of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


class ReadingOrder(Record):
    """What decides the order of an epoch, and which rows it has."""

    block_rows: int = Field(
        default=128, ge=1, description="Consecutive rows that are read at once."
    )
    buffer_rows: int = Field(
        default=2048,
        ge=1,
        description="Rows that are mixed: of compressed or remote stores two such buffers are held "
        "in memory, of others the system's page cache serves.",
    )
    on_damage: Literal["stop", "skip"] = Field(
        default="stop",
        description="A row that fails its checksum when it is first read, or when its file has "
        "changed since: stop, naming its shard; or skip and report.",
    )


class ReadingParams(ReadingOrder):
    """How shuffled rows are read."""

    prefetch: int = Field(default=2, ge=1, description="Batches made ahead of the consumer.")
    cache_limit: ByteSize | None = Field(
        default=None,
        description="Read whole shards through copies on this machine of at most so many bytes, or "
        "so much (50 GB), the least recently used making room: for stores on a "
        "network. Best with block_rows a multiple of the rows of a shard.",
    )
    cache_folder: str | None = Field(
        default=None,
        description="Where such copies lie, shared by the processes of a machine; null: "
        "gill/shards in XDG_CACHE_HOME or ~/.cache.",
    )
