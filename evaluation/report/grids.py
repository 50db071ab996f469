"""Pictures with their contexts, as they came and at their worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from corpora.pictures import open_picture
from evaluation.report.html import Cell, Grid, Tone
from evaluation.report.words import METHODS, set_name
from evaluation.results import Record

_SHOWN = (
    "story_5_pictures", "dialogue_10", "story_5", "story_1", "dialogue_5", "dialogue_1", "captions",
)  # fmt: skip
_GENERATED = ("generator", "gill")
_ATTRIBUTES = 5
_WORST = 8


def grids(records: Sequence[Record], limit: int) -> list[Grid]:
    """The first examples of each set that has pictures."""
    found = []
    for name in _order(records):
        rows = [r for r in records if r.set == name and "gill" in r.pictures][:limit]
        if rows:
            found.append(_grid(set_name(name).capitalize(), rows))
    return found


def failures(records: Sequence[Record]) -> list[Grid]:
    """The examples on which GILL's picture is furthest from the real one, by each judge."""
    made = [r for r in records if "gill" in r.pictures and r.set in _SHOWN]
    judges: list[tuple[str, str, Callable[[Record], tuple[float, float]]]] = [
        (
            "gill.oracle_attributes",
            "Failures: fewest right attributes by the oracle (then lowest CLIP similarity)",
            lambda r: (r.scores["gill.oracle_attributes"], r.scores["gill.clip_similarity"]),
        ),
        (
            "gill.clip_similarity",
            "Failures: lowest CLIP similarity to the real picture",
            lambda r: (r.scores["gill.clip_similarity"], 0.0),
        ),
    ]
    found = []
    for name, title, worst in judges:
        judged = sorted((r for r in made if name in r.scores), key=worst)[:_WORST]
        if judged:
            note = f"The {len(judged)} worst of {len(made)} pictures in all sets shown above."
            found.append(_grid(title, judged, note, with_set=True))
    return found


def answers(records: Sequence[Record], limit: int) -> list[Grid]:
    """Captions of pictures and answers about them, beside what people said."""
    found = []
    for name, title in (("coco_captioning", "Captions of pictures"), ("vqa", "Questions")):
        rows = [
            [
                Cell([*_prompt(record), _opened(record.real)]),
                Cell(text=record.texts.get("gill", "")),
                Cell(text="; ".join(list(dict.fromkeys(record.references))[:3])),
            ]
            for record in [r for r in records if r.set == name][:limit]
        ]
        if rows:
            found.append(Grid(title, ["picture", "GILL says", "people said"], rows))
    return found


def _order(records: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(record.set for record in records)
    return [name for name in _SHOWN if name in names]


def _grid(title: str, rows: Sequence[Record], note: str = "", with_set: bool = False) -> Grid:
    methods = [m for m in _GENERATED if any(m in r.pictures for r in rows)]
    retrieved = any("retrieved" in record.pictures for record in rows)
    columns = ["context", "real picture", *["retrieved"] * retrieved]
    columns += [METHODS[method] for method in methods]
    body = []
    for record in rows:
        head = [f"{set_name(record.set)}:\n"] if with_set else []
        row = [Cell([*head, *_context(record)]), Cell([_opened(record.real)])]
        if retrieved:
            row.append(_retrieved(record))
        row += [_judged(record, method) for method in methods]
        body.append(row)
    return Grid(title, columns, body, note)


def _context(record: Record) -> list[str | Image.Image]:
    """What GILL reads, words and pictures in their order."""
    parts: list[str | Image.Image] = []
    for part in record.context:
        parts.append(_opened(part["picture"]) if "picture" in part else part["text"])
    return parts


def _prompt(record: Record) -> list[str]:
    return [record.prompt + "\n"] if record.prompt.strip() else []


def _retrieved(record: Record) -> Cell:
    if "retrieved" not in record.pictures:
        return Cell()
    score = record.scores.get("retrieved.similarity")
    text = "" if score is None else f"cosine {score:.2f}"
    return Cell([_opened(record.pictures["retrieved"])], text, "quiet")


def _judged(record: Record, method: str) -> Cell:
    """A generated picture with what its judges say."""
    if method not in record.pictures:
        return Cell()
    share = record.scores.get(f"{method}.oracle_attributes")
    similarity = record.scores.get(f"{method}.clip_similarity")
    words = []
    tone: Tone = "quiet"
    if share is not None:
        words.append(f"{round(share * _ATTRIBUTES)} of {_ATTRIBUTES}")
        tone = "good" if share == 1 else "bad"
    if similarity is not None:
        words.append(f"CLIP {similarity:.2f}")
    return Cell([_opened(record.pictures[method])], ", ".join(words), tone)


def _opened(reference: str | None) -> Image.Image:
    """A picture of the report; contexts come from files, tar members and folders alike."""
    picture = open_picture(reference or "")
    picture.thumbnail((320, 320))  # hundreds of photographs fit in memory
    return picture
