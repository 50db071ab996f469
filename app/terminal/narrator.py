"""An answer told in the terminal: words as they come, pictures where they belong."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from app.terminal.answer_files import AnswerFolder
from app.terminal.screen import Screen
from pipeline.talking.answers import (
    Ended,
    Event,
    GeneratedImage,
    PictureProgress,
    Reply,
    RetrievedImage,
    Started,
    Text,
)


class Narrator:
    """Tells one answer, event by event, and keeps its pictures in `folder`; `quiet` prints nothing.

    A lone full stop in front of a picture is how the model ends a prompt that has none; it is not
    told.
    """

    def __init__(self, folder: AnswerFolder, screen: Screen, *, quiet: bool = False) -> None:
        self._folder, self._screen, self._quiet = folder, screen, quiet
        self._held = ""
        self._open_line = False
        self.reply = Reply()

    def tell(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        """Take the events of an answer; gives its pieces as plain data, pictures by their paths."""
        described: list[dict[str, Any]] = []
        for event in events:
            self.reply.add(event)
            if isinstance(event, Text):
                self._say(event.text)
            elif isinstance(event, PictureProgress):
                self._show_step(event)
            elif isinstance(event, Ended):
                self._end_words(last=not self.reply.images)
            elif not isinstance(event, Started):
                self._end_words(last=False)
                described.append(_describe_picture(event, self._folder.save(event.picture)))
                if not self._quiet:
                    print(_line(described[-1]), flush=True)
                    self._screen.show(event.picture)
        pictures = iter(described)
        return [
            {"kind": "text", "text": piece.text.strip()}
            if isinstance(piece, Text)
            else next(pictures)
            for piece in self.reply
        ]

    def _say(self, text: str) -> None:
        self._held += text
        if not self._open_line:
            self._held = self._held.lstrip()
        if self._held and (self._open_line or self._held.strip() != "."):
            self._print(self._held, end="")
            self._open_line, self._held = True, ""

    def _end_words(self, *, last: bool) -> None:
        if self._held and last:
            self._print(self._held, end="")
        if self._open_line or (self._held and last):
            self._print("")
        self._held, self._open_line = "", False

    def _show_step(self, progress: PictureProgress) -> None:
        if not self._quiet and sys.stderr.isatty():
            end = "\r\x1b[K" if progress.step == progress.steps else ""
            state = f"\rpicture: step {progress.step} of {progress.steps}{end}"
            print(state, end="", file=sys.stderr, flush=True)

    def _print(self, text: str, end: str = "\n") -> None:
        if not self._quiet:
            print(text, end=end, flush=True)


def _describe_picture(answer: RetrievedImage | GeneratedImage, path: Path) -> dict[str, Any]:
    """A picture as plain data: where it lies, and all that makes or finds it again."""
    one: dict[str, Any] = {"path": str(path), "p_generate": answer.generate_probability}
    if isinstance(answer, GeneratedImage):
        names = ("seed", "steps", "guidance", "scheduler", "negative_prompt", "score")
        return one | {"kind": "generated"} | {name: getattr(answer, name) for name in names}
    one |= {"kind": "retrieved", "score": answer.score, "source": answer.source}
    return one | {"caption": answer.caption}


def _line(one: dict[str, Any]) -> str:
    if one["kind"] == "generated":
        how = f"seed {one['seed']}, {one['steps']} steps, guidance {one['guidance']:g}"
        return f"[generated picture: {one['path']}, {how}]"
    return f"[retrieved picture: {one['path']}, score {one['score']:.3f}, from {one['source']}]"
