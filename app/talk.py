"""A conversation from which one can go back by a turn: asked again, otherwise, saved, restarted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.transcript import Exchange, Piece, to_json, to_page
from gill.loading import Gill
from gill_errors import InputError
from pipeline.talking.answers import (
    Event,
    GeneratedImage,
    Part,
    RetrievedImage,
    Started,
    Text,
)
from pipeline.talking.conversation import Conversation


class Talk:
    """What was said with one model; `knobs` are the settings of every turn (`Gill.settings`).

    A turn whose answer fails, or is broken off by closing its events, was never asked.
    """

    def __init__(
        self, gill: Gill, knobs: Mapping[str, Any], system_prompt: str | None = None
    ) -> None:
        gill.settings(**knobs)
        self._gill, self._knobs, self._system_prompt = gill, dict(knobs), system_prompt
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self._conversation = self._gill.conversation(system_prompt=self._system_prompt)
        self._before: Conversation | None = None
        self.exchanges: list[Exchange] = []

    def ask(self, turn: Sequence[Part], **knobs: Any) -> Iterator[Event]:
        """Answer a turn; raises ConversationError and GillError as `Gill.reply` does."""
        settings = self._gill.settings(**{**self._knobs, **knobs})
        pieces = [
            Piece(text=part) if isinstance(part, str) else Piece(picture=part) for part in turn
        ]
        yield from self._answer(self._conversation, Exchange(pieces, settings))

    def again(self, **knobs: Any) -> Iterator[Event]:
        """Answer the last turn anew, as if it had not been: with another seed, or other `knobs`.

        Pictures that were retrieved do not come again. Raises InputError where nothing was asked.
        """
        if self._before is None:
            raise InputError("nothing was asked yet: say something first")
        last, shown = self.exchanges[-1], self._conversation.shown
        changed = knobs or {"seed": random.randrange(2**31)}
        settings = self._gill.settings(last.settings, **changed)
        before = self._before.fork()
        before.shown = list(shown)
        yield from self._answer(before, Exchange(last.turn, settings), in_place_of_last=True)

    def save(self, file: Path) -> None:
        """Write all that was said: a page that needs nothing else (.html), or JSON (.json).

        Raises InputError for another name, or one that exists.
        """
        kinds = {".html": to_page, ".json": to_json}
        if file.suffix.lower() not in kinds:
            raise InputError(f"{file}: name a file that ends in .html or .json")
        content = kinds[file.suffix.lower()](self.exchanges)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as stream:
                stream.write(content)
        except FileExistsError:
            raise InputError(f"{file} exists: choose another name") from None
        except OSError as error:
            raise InputError(f"{file} cannot be written: {error.strerror}") from None

    def _answer(
        self, conversation: Conversation, exchange: Exchange, *, in_place_of_last: bool = False
    ) -> Iterator[Event]:
        before, going_on = conversation, conversation.fork()
        for event in going_on.stream(
            [one.picture if one.picture is not None else one.text for one in exchange.turn],
            exchange.settings,
        ):
            if isinstance(event, Started):
                exchange.forgotten = event.forgotten_turns
            elif isinstance(event, Text | RetrievedImage | GeneratedImage):
                exchange.add(event)
            yield event
        if in_place_of_last:
            self.exchanges.pop()
        self._before, self._conversation = before, going_on
        self.exchanges.append(exchange)
