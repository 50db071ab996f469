"""The records that every reader of this room returns, and the account of what it left out.

    captions   tables, shards, folders   ->  CaptionRow
    vist       story-in-sequence JSON    ->  Story(StoryPicture, ...)
    visdial    VisDial 1.0 JSON          ->  Dialogue(Round, ...)
    coco       captions JSON             ->  CaptionedImage
    vqa        questions + annotations   ->  Question

An `image` is a reference that `corpora.pictures.open_picture` opens: a path, or `shard.tar#member`.
It is None where the reader was given no folder of pictures.
"""

from collections import Counter
from dataclasses import dataclass, field

from gill_errors import InputError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""What people call the three splits, in lower case."""


class CorpusError(InputError):
    """A file as a whole cannot be used: what is wrong, in which file, and what to do."""


class CaptionTableError(CorpusError):
    """A caption table that cannot be used at all."""


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """One caption of one picture. `split` is "train", "val" or "test"."""

    id: str
    image: str
    caption: str
    split: str


@dataclass(frozen=True, slots=True)
class StoryPicture:
    """One picture of a story with its sentence; `id` is the photo's Flickr id."""

    id: str
    image: str | None
    caption: str


@dataclass(frozen=True, slots=True)
class Story:
    """Pictures in the order in which the story tells them."""

    id: str
    pictures: tuple[StoryPicture, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions, in the order of the story."""
        return tuple(picture.caption for picture in self.pictures)


@dataclass(frozen=True, slots=True)
class Round:
    """One question and its answer.

    `candidates` are the answers to rank (100 in VisDial, empty where the file lists none) and
    `gt_index` is the place of `answer` among them. `relevance` holds, for the one round of a
    dialogue that has dense annotations, a number in [0, 1] per candidate.
    """

    question: str
    answer: str
    candidates: tuple[str, ...] = ()
    gt_index: int | None = None
    relevance: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Rounds of questions and answers about one COCO picture, which also has a caption."""

    id: str
    image: str | None
    caption: str
    rounds: tuple[Round, ...]

    @property
    def questions_and_answers(self) -> tuple[tuple[str, str], ...]:
        """The rounds as pairs."""
        return tuple((one.question, one.answer) for one in self.rounds)


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """A COCO picture with all its captions."""

    id: str
    image: str | None
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A VQAv2 question. `answers` are those of the annotators (10 in VQAv2), empty without
    annotations; `answer` is the most common one."""

    id: str
    image_id: str
    image: str | None
    question: str
    answers: tuple[str, ...] = ()
    answer: str | None = None
    question_type: str | None = None
    answer_type: str | None = None


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A record that was left out: `row` is a line number, an index or an id of `file`."""

    file: str
    row: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.file}: row {self.row}: {self.reason}"
        return f"{text} ({self.detail})" if self.detail else text


@dataclass(frozen=True, slots=True)
class Report:
    """How many records of a file were kept, and every one that was not."""

    source: str
    kept: int
    excluded: tuple[Exclusion, ...] = field(default=())

    @property
    def reasons(self) -> dict[str, int]:
        """Number of exclusions per reason, the most frequent first."""
        return dict(Counter(exclusion.reason for exclusion in self.excluded).most_common())

    def __str__(self) -> str:
        text = f"{self.source}: {self.kept} kept, {len(self.excluded)} excluded"
        if self.excluded:
            text += ": " + ", ".join(f"{reason} {n}" for reason, n in self.reasons.items())
        return text
