"""The text of an answer, as its tokens come."""

from __future__ import annotations

from typing import Any


class Spelling:
    """Whole characters and the tokens behind them: a character may take several tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._told: list[int] = []
        self._untold: list[int] = []

    def add(self, token: int) -> None:
        """The answer goes on with `token`."""
        self._untold.append(token)

    def take(self, *, flush: bool) -> tuple[str, tuple[int, ...]] | None:
        """Text that was not taken yet and its tokens; None where its last character is incomplete,
        unless `flush`.

        Decoded behind the piece before it, because some tokenizers drop a leading space.
        """
        if not self._untold:
            return None
        before = self._decode(self._told)
        text = self._decode(self._told + self._untold)
        if text.endswith("\ufffd") and not flush:
            return None
        tokens = tuple(self._untold)
        self._told, self._untold = self._untold, []
        return text[len(before) :], tokens

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
