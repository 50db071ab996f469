"""The text of an answer, as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Spelling:
    """Whole characters and the tokens behind them, up to the first of the texts `stop`.

    A character may take several tokens, a stop text may begin and end within one. `stopped` is
    whether one came; neither its text nor its tokens are taken.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._told: list[int] = []
        self._untold: list[int] = []
        self.stopped = False

    def add(self, token: int) -> None:
        """The answer goes on with `token`."""
        self._untold.append(token)

    def take(self, *, flush: bool) -> tuple[str, tuple[int, ...]] | None:
        """Text that was not taken yet and its tokens; None where there is none to take yet: its
        last character is incomplete, or may begin a stop text. `flush`: nothing more will come.
        """
        if not self._untold:
            return None
        text = self._text(len(self._untold))
        at = min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=None)
        count = len(self._untold)
        if at is not None:
            self.stopped = True
            text = text[:at]
            count = next(n for n in range(count, -1, -1) if len(self._text(n)) <= at)
        elif not flush and (text.endswith("\ufffd") or self._may_stop(text)):
            return None
        tokens = tuple(self._untold[:count])
        self._told, self._untold = self._untold, []
        return (text, tokens) if tokens or text else None

    def _text(self, count: int) -> str:
        """The first `count` untold tokens, decoded behind the piece before them: some tokenizers
        drop a leading space."""
        whole = self._decode(self._told + self._untold[:count])
        return whole[len(self._decode(self._told)) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def _may_stop(self, text: str) -> bool:
        """Whether the end of the text is the beginning of a stop text."""
        return any(text.endswith(stop[:n]) for stop in self._stop for n in range(1, len(stop)))
