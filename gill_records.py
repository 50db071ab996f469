"""Settings and records: checked when they are made, and never changed afterwards."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen model of pydantic in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def part_of(cls, whole: BaseModel) -> Self:
        """The fields that this kind of record shares with a larger one."""
        return cls(**{name: getattr(whole, name) for name in cls.model_fields})
