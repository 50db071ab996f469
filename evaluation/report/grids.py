"""Which pictures are shown with their contexts: as conversations, as they came, at their worst."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.report.words import set_name
from evaluation.results import Record

_SHOWN = (
    "story_5_pictures", "dialogue_10", "story_5", "story_1", "dialogue_5", "dialogue_1", "captions",
)  # fmt: skip
_CONVERSATIONS = {
    "follow_ups": "A picture that is asked for, and changed",
    "asked": "A picture that is asked for",  # which the one above begins with
    "story_5_pictures": "A story, told and shown",
    "dialogue_10": "A dialogue, in words",
    "captions": "A caption",
}
_WORST = 8


@dataclass(frozen=True)
class Grid:
    """Examples with what was made of each."""

    title: str
    records: Sequence[Record]
    note: str = ""
    names_sets: bool = False

    @property
    def methods(self) -> list[str]:
        """Those of which there are pictures."""
        methods = ("retrieved", "generator", "gill")
        return [m for m in methods if any(m in record.pictures for record in self.records)]


@dataclass(frozen=True)
class Exchange:
    """What GILL was told and shown, in order, and what it answered."""

    told: Sequence[tuple[str, str | None]]
    """(text, picture that follows it)."""
    words: str = ""
    pictures: Sequence[tuple[str, str]] = ()
    """(what it is, picture)."""


@dataclass(frozen=True)
class Talk:
    """A conversation of one exchange or several."""

    title: str
    exchanges: Sequence[Exchange]


def told(record: Record) -> list[tuple[str, str | None]]:
    """The context of a record: each text with the picture that follows it."""
    return _told(record.context)


def _told(context: Sequence[Mapping[str, str]]) -> list[tuple[str, str | None]]:
    parts: list[tuple[str, str | None]] = []
    for part in context:
        if "picture" not in part:
            parts.append((part["text"].strip(), None))
        elif parts and parts[-1][1] is None:
            parts[-1] = (parts[-1][0], part["picture"])
        else:
            parts.append(("", part["picture"]))
    return parts


def talks(records: Sequence[Record]) -> list[Talk]:
    """The first example of each kind of conversation that was evaluated, as a conversation."""
    shown = [
        Talk("A question in words", [Exchange(told(record), words=record.texts["gill"])])
        for record in [r for r in records if r.set == "questions"][:1]
    ]
    for name, title in _CONVERSATIONS.items():
        record = next((r for r in records if r.set == name and "gill" in r.pictures), None)
        if record is None or (name == "asked" and any(r.set == "follow_ups" for r in records)):
            continue
        made = [("generated", record.pictures["gill"])]
        if "retrieved" in record.pictures:
            made.append(("retrieved", record.pictures["retrieved"]))
        shown.append(Talk(title, _exchanges(record, made)))
    said = [r for r in records if r.set in ("coco_captioning", "vqa") and r.texts.get("gill")]
    for record in list({r.set: r for r in reversed(said)}.values())[::-1]:
        question = record.prompt.strip()
        title = "A question about a picture" if question else "What does it show?"
        exchange = Exchange([(question, record.real)], words=record.texts["gill"])
        shown.append(Talk(title, [exchange]))
    return shown


def _exchanges(record: Record, made: Sequence[tuple[str, str]]) -> list[Exchange]:
    """The context, parted behind each picture that was an answer itself, and the last answer."""
    exchanges, since = list[Exchange](), list[Mapping[str, str]]()
    for part in record.context:
        if "answer" in part:
            exchanges.append(Exchange(_told(since), pictures=[("generated", part["answer"])]))
            since = []
        else:
            since.append(part)
    return [*exchanges, Exchange(_told(since), pictures=made)]


def grids(records: Sequence[Record], limit: int) -> list[Grid]:
    """The first examples of each set that has pictures."""
    of_sets = {
        name: [r for r in records if r.set == name and "gill" in r.pictures] for name in _SHOWN
    }
    return [Grid(set_name(name).capitalize(), of[:limit]) for name, of in of_sets.items() if of]


def failures(records: Sequence[Record]) -> list[Grid]:
    """The examples on which GILL's picture is furthest from the real one, by each judge."""
    made = [r for r in records if "gill" in r.pictures and r.set in _SHOWN]
    judges: list[tuple[str, str, Callable[[Record], tuple[float, ...]]]] = [
        (
            "gill.oracle_attributes",
            "Failures: fewest right attributes by the oracle (then lowest CLIP similarity)",
            lambda r: (r.scores["gill.oracle_attributes"], r.scores["gill.clip_similarity"]),
        ),
        (
            "gill.clip_similarity",
            "Failures: lowest CLIP similarity to the real picture",
            lambda r: (r.scores["gill.clip_similarity"],),
        ),
        (
            "retrieved.similarity",
            "Failures: retrieved pictures that matched worst",
            lambda r: (r.scores["retrieved.similarity"],),
        ),
    ]
    found = []
    for name, title, worst in judges:
        judged = sorted((r for r in made if name in r.scores), key=worst)[:_WORST]
        if judged:
            note = f"The {len(judged)} worst of {len(made)} pictures in all sets shown above."
            found.append(Grid(title, judged, note, names_sets=True))
    return found
