"""What people say to a chat model: requests for pictures, and questions that words answer.

requests.yaml and questions.yaml are this project's own, each with a part that training never sees.
A file of the user's own has a conversation a line, which ends with what is to be answered:

    {"messages": [{"role": "user", "content": "Why is the sea salty?"}]}
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from corpora.records import CorpusError

Part = Literal["train", "held_out"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Phrasings:
    """Ways to ask for a picture, about one, and for words and a picture."""

    asked: tuple[str, ...]
    """With `{caption}`."""
    joined: tuple[str, ...]
    """With `{question}` and `{caption}`."""
    shown: tuple[str, ...]
    """What is asked about a picture; may be nothing."""


@dataclass(frozen=True)
class Said:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


Question = tuple[Said, ...]
"""A conversation that ends with the user's words."""


def phrasings(part: Part) -> Phrasings:
    """Those of requests.yaml."""
    content = _read_own("requests.yaml")
    return Phrasings(**{kind: tuple(parts[part]) for kind, parts in content.items()})


def own_questions(part: Part) -> list[Question]:
    """Those of questions.yaml."""
    return [(Said("user", text),) for text in _read_own("questions.yaml")[part]]


def read_part(path: str | Path, part: Part, share: float) -> list[Question]:
    """The questions of a file that training takes, or those that it never sees: so large a share of
    them, by a hash of each one's words, so that it stays where it is whatever else the file has.

    Raises:
        CorpusError: as `read_questions`; or training is left without any.
    """
    questions = read_questions(path)
    chosen = [one for one in questions if _is_held_out(one, share) == (part == "held_out")]
    if part == "train" and not chosen:
        raise CorpusError(
            f"{path}: all of its {len(questions)} questions are held out: set "
            "training.replies.held_out lower"
        )
    return chosen


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSONL file of messages; answers at the end of a conversation are left out.

    Raises:
        CorpusError: no such file, no question in it, or a line that is no conversation, by number.
    """
    try:
        # Within a line JSON may hold what else ends lines, such as U+2028.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    questions = [
        _question(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not questions:
        raise CorpusError(
            f"{path}: no questions in it: one a line, as "
            '{"messages": [{"role": "user", "content": "..."}]}'
        )
    return questions


def asked_for(phrasing: str, caption: str) -> str:
    """A request for the picture of a caption."""
    return phrasing.replace("{caption}", _bare(caption))


def joined_with(phrasing: str, question: Question, caption: str) -> Question:
    """A question after whose answer the picture of a caption is to come."""
    *before, last = question
    # The caption last: a question that spells {caption} stays as it is.
    head, mark, tail = phrasing.partition("{caption}")
    head, tail = (part.replace("{question}", last.text) for part in (head, tail))
    return (*before, Said("user", head + (_bare(caption) if mark else "") + tail))


def _is_held_out(question: Question, share: float) -> bool:
    words = "\0".join(text for said in question for text in (said.role, said.text))
    place = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8])
    return place < share * 2**64


def _bare(caption: str) -> str:
    return caption.strip().removesuffix(".")


def _read_own(name: str) -> Any:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _question(line: str, where: str) -> Question:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise CorpusError(f"{where}: not JSON") from None
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise CorpusError(f"{where}: it has no list messages")
    said = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(text, str):
            raise CorpusError(
                f"{where}: a message is no text (content) of a role among {', '.join(ROLES)}"
            )
        said.append(Said(role, text))
    while said and said[-1].role == "assistant":
        said.pop()
    if not said or said[-1].role != "user" or not said[-1].text.strip():
        raise CorpusError(f"{where}: nobody asks anything at its end")
    return tuple(said)
