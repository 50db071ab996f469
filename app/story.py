"""A story with its pictures: the text that people give, and the page that it becomes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.transcript import Piece, template
from gill_errors import InputError
from gill_files import written_whole
from pipeline.talking.answers import Answer, Text

_MAX_BYTES = 1_000_000
_TEXT_SUFFIXES = (".txt", ".md", ".text")


@dataclass
class Passage:
    """Paragraphs, and the picture that stands behind the last of them."""

    paragraphs: list[str] = field(default_factory=list)
    picture: Piece | None = None


def read_story(arguments: Sequence[str]) -> str:
    """The text that a command line gives: words, files of text by their names, `-` for the standard
    input; one paragraph each.

    Raises InputError for a file that is absent, empty, too long or no UTF-8 text, and for no words.
    """
    text = "\n\n".join(_read(argument) for argument in arguments)
    if not text.strip():
        raise InputError("the story has no words: give a text, a file of text, or - for the input")
    return text


def _read(argument: str) -> str:
    if argument == "-":
        return _decoded(sys.stdin.buffer.read(_MAX_BYTES + 1), "the input")
    called_so = argument.lower().endswith(_TEXT_SUFFIXES) and len(argument.split()) == 1
    if not called_so and not os.path.isfile(argument):
        return argument
    try:
        with open(argument, "rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{argument} cannot be read: {error.strerror}") from None
    return _decoded(content, argument)


def _decoded(content: bytes, name: str) -> str:
    if len(content) > _MAX_BYTES:
        raise InputError(f"{name} has more than {_MAX_BYTES} bytes: give a shorter story")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise InputError(f"{name} is empty: there is no story in it")
    return text


def passages_of(pieces: Sequence[Answer]) -> list[Passage]:
    """The story as it is read: each picture behind the words that come before it."""
    passages = [Passage()]
    for piece in pieces:
        if not isinstance(piece, Text):
            passages[-1].picture = Piece.of(piece)
            passages.append(Passage())
        else:
            paragraphs = (" ".join(one.split()) for one in piece.text.split("\n\n"))
            passages[-1].paragraphs += filter(None, paragraphs)
    return [one for one in passages if one.paragraphs or one.picture]


def to_story_page(pieces: Sequence[Answer], title: str) -> str:
    """A whole HTML file that needs nothing else, pictures in it as data URIs."""
    return template("story.html").render(passages=passages_of(pieces), title=title)


def choose_page(out: Path | None) -> Path:
    """Where the page goes: `out`, which must not exist, or the first free of story.html,
    story-2.html, ... Raises InputError, before anything is made."""
    if out is None:
        number = 1
        while (path := Path("story.html" if number == 1 else f"story-{number}.html")).exists():
            number += 1
        return path
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: name a file that ends in .html")
    if out.exists():
        raise InputError(f"{out} exists: choose another name")
    there = next(path for path in out.absolute().parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{there} cannot be written to: name another place")
    return out


def write_story_page(path: Path, pieces: Sequence[Answer], title: str) -> None:
    """Write the page, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(to_story_page(pieces, title), encoding="utf-8")


def describe(pieces: Sequence[Answer]) -> list[dict[str, Any]]:
    """The pieces as plain data, in order; pictures without their pixels."""
    described: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, Text):
            described.append({"kind": "text", "text": piece.text.strip()})
        else:
            rest = {name: value for name, value in vars(piece).items() if name != "picture"}
            described.append({"kind": Piece.of(piece).kind, **rest})
    return described
