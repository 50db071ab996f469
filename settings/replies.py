"""What a chat model is asked so that training keeps its own answers."""

from __future__ import annotations

from pydantic import Field

from gill_records import Record

OWN_QUESTIONS = "built-in"
CHAT_MIXTURE = {"asked": 8.0, "shown": 3.0, "told": 4.0, "joined": 1.0}
"""The streams of a chat model, and their weights where `training.mixture` names none."""


class RepliesParams(Record):
    """The frozen chat model's own answers; `training.mixture` says whether training takes any."""

    questions: str = Field(
        OWN_QUESTIONS,
        description="`built-in`: this project's own; or a JSONL file, a conversation a line: "
        '{"messages": [{"role": "user", "content": "..."}]}',
    )
    held_out: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the questions of such a file that training never sees and the table "
        "chat asks, by a hash of their words; the built-in ones have a held-out part of their own",
    )
    joined: int = Field(
        200,
        ge=0,
        description="how many times a question is also asked together with the picture of a "
        "training caption, for the stream `joined`",
    )
    max_tokens: int = Field(
        64, ge=1, description="longest answer; one that goes on is cut there, and counted"
    )
    seed: int = Field(0, description="of the captions and phrasings that are drawn")
