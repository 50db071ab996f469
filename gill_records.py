"""Settings and records: checked when they are made, and never changed afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen model of pydantic in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def part_of(cls, whole: BaseModel) -> Self:
        """The fields that this kind of record shares with a larger one."""
        return cls(**{name: getattr(whole, name) for name in cls.model_fields})


ABSENT = "absent"


def differences(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the dotted key, and what stands there and here."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in sorted(there.keys() | here.keys()):
            inside = f"{key}.{name}".lstrip(".")
            yield from differences(there.get(name, ABSENT), here.get(name, ABSENT), inside)
    elif there != here:
        yield key, there, here
