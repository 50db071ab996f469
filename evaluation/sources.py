"""Where the examples of the evaluation come from: the original files, or the miniature's own.

The miniature world is written in the same formats and read by the same readers; what differs
between it and the real sets (how a dialogue or a question is put, whether the truth is known) is a
property of the source. Every reader's report is printed: what was kept, what was left out and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from corpora.caption_table import CaptionTable
from corpora.coco import read_captioned_images
from corpora.prompts import dialogue_prompt, released_dialogue_prompt
from corpora.records import CaptionedImage, Dialogue, Question, Report, Story
from corpora.visdial import read_dialogues
from corpora.vist import read_stories
from corpora.vqa import read_questions
from gill.artifacts import Artifacts
from miniature.language import question_prompt
from miniature.world import Scene
from settings.params import Params, ParamsError

T = TypeVar("T")
Truth = dict[str, Scene]


@dataclass(frozen=True)
class Source(Generic[T]):
    """Examples of one set whose pictures are all there."""

    examples: Sequence[T]
    of: int
    """How many the files offer."""
    scenes: Truth = field(default_factory=dict)
    """Story, dialogue or picture to the scene of its (last) picture, where the truth is known."""
    prompt: Callable[[Any], str] = str
    """Puts the rounds of a dialogue, or a question up to its answer, into words."""
    moments: Mapping[str, tuple[Scene, ...]] = field(default_factory=dict)
    """Story to the scenes of all its pictures, where the truth is known."""


@dataclass(frozen=True)
class CaptionSource:
    """The run's own checked caption table."""

    table: CaptionTable
    scenes: Callable[[str], Scene | None]


def released_question_prompt(question: str) -> str:
    """The form of the released VisDial evaluation, up to the answer: the paper names none for VQA.

    released_question_prompt("is it red?")  ->  "Q: is it red?\\nA:"
    """
    return f"Q: {question}\nA:"


class Sources:
    """Each set is read when it is first asked for, once.

    Raises ParamsError for a named file that is not there, and what the readers raise.
    """

    def __init__(self, params: Params, artifacts: Artifacts) -> None:
        self._params, self._section = params, params.evaluation
        self._folder, self._captions = artifacts.miniature, artifacts.captions
        self.is_miniature = params.captions.table == "miniature"
        _refuse_absent_files(params)

    @cached_property
    def stories(self) -> Source[Story]:
        """VIST, or the miniature's stories."""
        files, folder = self._section.vist, self._folder
        if files.stories is not None and files.images is not None:
            return _source(read_stories(files.stories, files.images, self._section.check))
        moments = {
            id_: tuple(Scene(*scene) for scene in told)
            for id_, told in self._truth["stories"].items()
        }
        scenes = {id_: told[-1] for id_, told in moments.items()}
        read = read_stories(folder / "stories.json", folder / "story_images")
        return replace(_source(read, scenes), moments=moments)

    @cached_property
    def dialogues(self) -> Source[Dialogue]:
        """VisDial, or the miniature's dialogues."""
        files, folder = self._section.visdial, self._folder
        if files.dialogues is not None and files.images is not None:
            read = read_dialogues(
                files.dialogues, images_dir=files.images, check=self._section.check
            )
            return _source(read, prompt=released_dialogue_prompt)
        scenes = {id_: Scene(*scene) for id_, scene in self._truth["dialogues"].items()}
        read = read_dialogues(folder / "dialogues.json", images_dir=folder / "dialogue_images")
        return _source(read, scenes, dialogue_prompt)

    @cached_property
    def coco(self) -> Source[CaptionedImage]:
        """The pictures that are captioned (Table 7)."""
        return self._coco(self._section.coco.captions, self._section.coco.images)

    @cached_property
    def coco_2014(self) -> Source[CaptionedImage]:
        """The captions that are drawn (Table 8)."""
        return self._coco(self._section.coco_2014.captions, self._section.coco_2014.images)

    @cached_property
    def questions(self) -> Source[Question]:
        """VQAv2, or the miniature's questions."""
        files, folder = self._section.vqa, self._folder
        if files.questions is not None:
            read = read_questions(
                files.questions, files.annotations, files.images, self._section.check
            )
            return _source(read, prompt=released_question_prompt)
        read = read_questions(
            folder / "questions.json", folder / "annotations.json", folder / "images" / "test"
        )
        return _source(read, prompt=lambda question: question_prompt("", question))

    @cached_property
    def captions(self) -> CaptionSource:
        """The test split of the run's own table."""
        return CaptionSource(CaptionTable(self._captions), self._scene_of)

    def read(self, tables: Sequence[str]) -> None:
        """Read now what these tables will ask for, so that a bad file is found early."""
        if {"table_5", "stories_told"} & set(tables):
            _ = self.stories
        if "table_7" in tables and self.has("coco"):
            _ = self.coco
        if "table_7" in tables and self.has("vqa"):
            _ = self.questions
        if {"retrieval", "latency"} & set(tables):
            _ = self.captions

    def has(self, group: str) -> bool:
        """Whether a group of files can be read: named, or drawn."""
        return self.is_miniature or getattr(self._section, group).named

    def _coco(self, captions: str | None, images: str | None) -> Source[CaptionedImage]:
        if captions is not None and images is not None:
            return _source(read_captioned_images(captions, images, self._section.check))
        read = read_captioned_images(self._folder / "coco_captions.json", self._folder)
        scenes = {
            one.image: scene
            for one in read[0]
            if one.image is not None and (scene := self._scene_of(one.image)) is not None
        }
        return _source(read, scenes)

    @cached_property
    def _truth(self) -> dict:
        return json.loads((self._folder / "truth.json").read_text(encoding="utf-8"))

    def _scene_of(self, image: str) -> Scene | None:
        """The truth about one picture of the miniature's caption table."""
        if not self.is_miniature:
            return None
        name = Path(image).resolve().relative_to(self._folder.resolve())
        return Scene(*self._truth["pictures"][str(name)])


def _refuse_absent_files(params: Params) -> None:
    """Raise ParamsError for keys that name nothing, before hours are spent."""
    section = params.evaluation
    lines = section.unnamed_files(params.captions.table == "miniature")
    lines += [
        f"evaluation.{key}: there is no {path}"
        for key, path in section.files().items()
        if not Path(path).exists()
    ]
    if lines:
        raise ParamsError("\n".join(lines))


def _source(
    read: tuple[Sequence[T], Report],
    scenes: Truth | None = None,
    prompt: Callable[[Any], str] = str,
) -> Source[T]:
    """What a reader read; prints what was left out.

    A sentence or caption that cannot be used is no example of its own: its story or picture is
    counted, where it is left out for it. Nor is an annotation of a question that is not asked.
    """
    examples, report = read
    print(report)
    for one in report.excluded[:3]:
        print(f"  {one}")
    lost = [
        one
        for one in report.excluded
        if not one.row.startswith("annotations[") and one.reason != "annotation without question"
    ]
    return Source(examples, report.kept + len(lost), scenes or {}, prompt)
