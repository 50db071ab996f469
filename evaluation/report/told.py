"""The stories that were told, as they are read: words with their pictures behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.results import Record

_SETS = {
    "told": "words read back",
    "told_pictures": "own pictures read back",
    "told_on": "the model goes on behind the first sentence",
}


@dataclass(frozen=True)
class Strip:
    """One way in which a story was told."""

    name: str
    pictures: Sequence[tuple[str, str]]
    """(words since the picture before, picture)."""


def told_stories(records: Sequence[Record], limit: int) -> list[list[Strip]]:
    """The first stories, each in all ways in which it was told."""
    stories: dict[str, dict[str, list[tuple[int, str, str]]]] = {}
    for record in records:
        if record.set in _SETS and "gill" in record.pictures:
            story, _, order = record.id.rpartition(":")
            told = stories.setdefault(story, {}).setdefault(record.set, [])
            told.append((int(order), record.prompt, record.pictures["gill"]))
    return [
        [
            Strip(name, [(words, picture) for _, words, picture in sorted(ways[set_])])
            for set_, name in _SETS.items()
            if set_ in ways
        ]
        for ways in list(stories.values())[:limit]
    ]
