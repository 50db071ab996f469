"""What annotators answered about pairs of pictures, kept in one SQLite file.

    folder/pairs.json              [{prompt, category, challenge, note, retrieved, generated}, ...]
    folder/annotations.sqlite      every answer ever given; the last one per question counts
      -> export: the released TSV format, one file per question (corpora.parti_prompts)

Paper: appendix F. Every annotator sees the same pairs in the same order, and as picture A the
retrieved one for half of them, drawn per annotator and prompt.

An answer is on the disk before the caller goes on, and none is ever overwritten: changing one's
mind adds a line.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from corpora.parti_prompts import PartiPrompt, VotedPrompt
from corpora.pictures import PictureError, open_picture
from gill_errors import InputError

Question = Literal["relevant", "realistic"]
Choice = Literal["A", "same", "B"]
Side = Literal["A", "B"]

QUESTIONS: tuple[Question, ...] = ("relevant", "realistic")
PAIRS, DATABASE = "pairs.json", "annotations.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS study (pairs TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS annotators (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY,
    annotator INTEGER NOT NULL REFERENCES annotators,
    pair INTEGER NOT NULL,
    question TEXT NOT NULL CHECK (question IN ('relevant', 'realistic')),
    vote TEXT NOT NULL CHECK (vote IN ('gen', 'ret', 'same')),
    at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX IF NOT EXISTS by_annotator ON answers (annotator, pair, question);
"""
_LAST = """
SELECT pair, question, vote FROM answers
JOIN annotators ON annotators.id = annotator
WHERE answers.id IN (SELECT MAX(id) FROM answers GROUP BY annotator, pair, question)
AND (:name IS NULL OR annotators.name = :name)
ORDER BY pair, annotator
"""


class AnnotationError(InputError):
    """A study or an answer cannot be used: what is wrong, where, and what to do."""


class Pair(BaseModel):
    """One entry of pairs.json. Pictures are paths inside the study's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1)
    category: str = ""
    challenge: str = ""
    note: str = ""
    retrieved: str
    generated: str

    @field_validator("prompt", "category", "challenge", "note")
    @classmethod
    def _fits_the_export(cls, text: str) -> str:
        if any(character in text for character in "\t\n\r"):
            raise ValueError("holds a tab or a line break, which the exported format cannot store")
        return text


@dataclass(frozen=True, slots=True)
class StudyProgress:
    """How far an annotator is. `resume` is the first pair (from 0) with an open question."""

    done: int
    total: int
    resume: int


def read_pairs(folder: Path) -> tuple[Pair, ...]:
    """The pairs of a study, every picture opened once.

    AnnotationError names each entry that is malformed, repeats a prompt, or whose picture is
    missing, unreadable or outside the folder.
    """
    path = folder / PAIRS
    try:
        pairs = TypeAdapter(tuple[Pair, ...]).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise AnnotationError(f"{path} is missing: it lists the pairs to compare") from error
    except ValidationError as error:
        raise AnnotationError(f"{path}: {error}") from error
    problems = []
    seen: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        if pair.prompt in seen:
            problems.append(f"entry {number}: the prompt of entry {seen[pair.prompt]} again")
        seen.setdefault(pair.prompt, number)
        for which in ("retrieved", "generated"):
            picture = folder / getattr(pair, which)
            if not picture.resolve().is_relative_to(folder.resolve()):
                problems.append(f"entry {number}: {which} picture {picture} is outside {folder}")
                continue
            try:
                open_picture(str(picture))
            except PictureError as error:
                problems.append(f"entry {number}: {which} picture {error}")
    if problems:
        raise AnnotationError(f"{path}:\n  " + "\n  ".join(problems))
    if not pairs:
        raise AnnotationError(f"{path} lists no pair")
    return pairs


class Annotations:
    """The answers of one study. Safe to use from several threads."""

    def __init__(self, folder: Path):
        """Open or begin the study in `folder`.

        AnnotationError when pairs.json is unusable or is not the one the answers were given to.
        """
        self.folder = folder
        self.pairs = read_pairs(folder)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(folder / DATABASE, check_same_thread=False, timeout=30)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(_SCHEMA)
        described = json.dumps([pair.model_dump() for pair in self.pairs], ensure_ascii=False)
        with self._lock, self._database:
            recorded = self._database.execute("SELECT pairs FROM study").fetchone()
            if recorded is None:
                self._database.execute("INSERT INTO study VALUES (?)", (described,))
        if recorded is not None and recorded[0] != described:
            raise AnnotationError(
                f"the answers in {folder / DATABASE} were given to other pairs than {PAIRS} lists "
                "now: put the old list back, or move the answers away to begin anew"
            )

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def record(self, annotator: str, pair: int, question: Question, choice: Choice) -> None:
        """Keep an answer; it is on the disk when this returns.

        AnnotationError when the pair does not exist or the name is empty, too long or unprintable.
        """
        name = checked_name(annotator)
        vote = self._meant(name, pair)[choice]
        with self._lock, self._database:
            self._database.execute("INSERT OR IGNORE INTO annotators (name) VALUES (?)", (name,))
            self._database.execute(
                "INSERT INTO answers (annotator, pair, question, vote) "
                "SELECT id, ?, ?, ? FROM annotators WHERE name = ?",
                (pair, question, vote, name),
            )

    def answers(self, annotator: str, pair: int) -> dict[Question, Choice]:
        """What this annotator last answered about this pair, as they see it (A or B)."""
        name = checked_name(annotator)
        seen_as = {vote: choice for choice, vote in self._meant(name, pair).items()}
        given = self._last(name)
        return {question: seen_as[vote] for number, question, vote in given if number == pair}

    def picture(self, annotator: str, pair: int, side: Side) -> Path:
        """The picture that this annotator sees as A or B."""
        vote = self._meant(checked_name(annotator), pair)[side]
        entry = self.pairs[pair]
        return self.folder / (entry.generated if vote == "gen" else entry.retrieved)

    def progress(self, annotator: str) -> StudyProgress:
        """Pairs with both questions answered; with all done, `resume` is the last pair."""
        answered = [0] * len(self.pairs)
        for pair, _, _ in self._last(checked_name(annotator)):
            answered[pair] += 1
        still_open = [pair for pair, count in enumerate(answered) if count < len(QUESTIONS)]
        total = len(self.pairs)
        return StudyProgress(
            total - len(still_open), total, still_open[0] if still_open else total - 1
        )

    def annotators(self) -> list[str]:
        """Names in the order of their first answer, which is the order of the exported votes."""
        with self._lock:
            rows = self._database.execute("SELECT name FROM annotators ORDER BY id").fetchall()
        return [name for (name,) in rows]

    def export(self, question: Question) -> list[VotedPrompt]:
        """The votes on one question, in the order of the pairs and, within, of `annotators`.

        Pairs without a vote are left out. The format holds no names: where an annotator skipped a
        pair, the row is shorter, and later votes move forward.
        """
        votes: dict[int, list[str]] = {}
        for pair, asked, vote in self._last():
            if asked == question:
                votes.setdefault(pair, []).append(vote)
        return [
            VotedPrompt(
                PartiPrompt(pair.prompt, pair.category, pair.challenge, pair.note),
                tuple(votes[number]),
            )
            for number, pair in enumerate(self.pairs)
            if number in votes
        ]

    def _meant(self, name: str, pair: int) -> dict[Choice, str]:
        """Which vote each choice stands for, for this annotator and pair."""
        if not 0 <= pair < len(self.pairs):
            raise AnnotationError(f"there is no pair {pair}; the study has {len(self.pairs)}")
        if generated_side(name, self.pairs[pair].prompt) == "A":
            return {"A": "gen", "same": "same", "B": "ret"}
        return {"A": "ret", "same": "same", "B": "gen"}

    def _last(self, name: str | None = None) -> list[tuple[int, Question, str]]:
        with self._lock:
            return self._database.execute(_LAST, {"name": name}).fetchall()


def generated_side(annotator: str, prompt: str) -> Side:
    """Under which letter the generated picture is shown: a coin per annotator and prompt."""
    coin = hashlib.sha256(f"{annotator}\0{prompt}".encode()).digest()[0]
    return "A" if coin % 2 else "B"


def checked_name(annotator: str) -> str:
    """The name without surrounding spaces; AnnotationError unless 1 to 40 printable characters."""
    name = annotator.strip()
    if not 1 <= len(name) <= 40 or not name.isprintable():
        raise AnnotationError("an annotator's name has 1 to 40 printable characters")
    return name
