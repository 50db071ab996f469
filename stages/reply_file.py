"""The file of replies: the frozen chat model's own answers to training questions.

One JSON line per answer in replies.jsonl:

    {"messages": [["user", "Why is the sea salty?"]], "row": null, "ids": [504, ...],
     "text": "The sea is salty because ...", "ended": true}

`row` is the row of the caption table whose picture comes after the words, where one was asked for.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from corpora.chat_requests import Question, Said


@dataclass(frozen=True)
class Request:
    """What is to be answered in words, and the caption row of the picture that comes then."""

    messages: Question
    row: int | None = None


@dataclass(frozen=True)
class Reply:
    """The frozen model's own answer to a request: token ids without an end."""

    request: Request
    ids: tuple[int, ...]
    ended: bool


def read_replies(file: Path) -> list[Reply]:
    """All answers of a finished store."""
    replies = []
    # Within a line JSON may hold what else ends lines, such as U+2028.
    for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        content = json.loads(line)
        messages = tuple(Said(role, text) for role, text in content["messages"])
        replies.append(
            Reply(Request(messages, content["row"]), tuple(content["ids"]), content["ended"])
        )
    return replies


def as_line(reply: Reply, text: str) -> str:
    """A reply as its line, without a line break; `text` is for people who read the file."""
    messages = [list(asdict(said).values()) for said in reply.request.messages]
    return json.dumps(
        {
            "messages": messages,
            "row": reply.request.row,
            "ids": reply.ids,
            "text": text,
            "ended": reply.ended,
        },
        ensure_ascii=False,
    )
