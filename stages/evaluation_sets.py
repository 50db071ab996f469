"""What is evaluated: sets of examples from held-out captions, stories and dialogues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from corpora.caption_table import CaptionTable
from corpora.pictures import open_picture
from corpora.prompts import dialogue_prompt, story_prompt
from corpora.visdial import read_dialogues
from corpora.vist import read_stories
from miniature.world import Scene
from pipeline.evaluation import Example
from stages.failures import StageError


@dataclass(frozen=True)
class EvaluationSet:
    """Examples of one protocol; `scenes` holds the truth where the miniature's oracle knows it."""

    name: str
    title: str
    examples: Sequence[Example]
    scenes: Sequence[Scene] | None = None


def caption_set(table: CaptionTable, limit: int, truth: Path | None) -> EvaluationSet:
    """The first caption of each held-out picture: read alone, as in Table 3's CC3M column.

    Raises StageError when the table has no test rows.
    """
    rows: list[int] = []
    seen: set[bytes] = set()
    split = table.rows_of_split("test")
    for row, picture in zip(split, table.pictures(split), strict=True):
        if picture not in seen and len(rows) < limit:
            seen.add(picture)
            rows.append(int(row))
    if not rows:
        raise StageError(
            f"{table.path} has no row in the split `test`: name splits in the table, or set "
            "captions.test_fraction"
        )
    images = table.images(rows)
    examples = [
        Example(f"row {row}", (caption,), caption, open_picture(image))
        for row, caption, image in zip(rows, table.captions(rows), images, strict=True)
    ]
    scenes = None
    if truth is not None:
        known = _read_truth(truth)["pictures"]
        scenes = [Scene(*known[str(Path(i).relative_to(truth.parent))]) for i in images]
    return EvaluationSet("captions", "One caption", examples, scenes)


def story_sets(folder: Path, limit: int) -> list[EvaluationSet]:
    """Stories as in Table 1: the last caption, all five, and all five with the four pictures.

    The generator's own text encoder reads the captions in every case: it takes no pictures.
    """
    stories, report = read_stories(folder / "stories.json", folder / "story_images")
    print(report)
    truth = _read_truth(folder / "truth.json")["stories"]
    stories = stories[:limit]
    scenes = [Scene(*truth[story.id][-1]) for story in stories]
    one, five, interleaved = [], [], []
    for story in stories:
        pictures = [open_picture(p.image) for p in story.pictures if p.image is not None]
        captions, last = story.captions, pictures[-1]
        whole = story_prompt(captions)
        parts: list[str | Image.Image] = []
        for caption, picture in zip(captions[:-1], pictures[:-1], strict=True):
            parts += [caption, picture]
        one.append(Example(story.id, (captions[-1],), captions[-1], last))
        five.append(Example(story.id, (whole,), whole, last))
        interleaved.append(Example(story.id, (*parts, captions[-1]), whole, last))
    return [
        EvaluationSet("story_1", "Story, last caption", one, scenes),
        EvaluationSet("story_5", "Story, five captions", five, scenes),
        EvaluationSet(
            "story_5_pictures", "Story, five captions and four pictures", interleaved, scenes
        ),
    ]


def dialogue_sets(folder: Path, limit: int, rounds: Sequence[int]) -> list[EvaluationSet]:
    """Dialogues as in Table 2: the first n rounds, newline-separated `Q: ... A: ...`."""
    dialogues, report = read_dialogues(
        folder / "dialogues.json", images_dir=folder / "dialogue_images"
    )
    print(report)
    truth = _read_truth(folder / "truth.json")["dialogues"]
    dialogues = dialogues[:limit]
    scenes = [Scene(*truth[dialogue.id]) for dialogue in dialogues]
    pictures = [open_picture(d.image) for d in dialogues if d.image is not None]
    sets = []
    for count in rounds:
        examples = []
        for dialogue, picture in zip(dialogues, pictures, strict=True):
            prompt = dialogue_prompt(dialogue.questions_and_answers[:count])
            examples.append(Example(dialogue.id, (prompt,), prompt, picture))
        plural = "round" if count == 1 else "rounds"
        sets.append(
            EvaluationSet(f"dialogue_{count}", f"Dialogue, {count} {plural}", examples, scenes)
        )
    return sets


def _read_truth(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
