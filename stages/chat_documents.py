"""Training documents of a chat model: what is said to it, and what it is to answer.

asked    a request with a caption          -> [IMG1..r]
shown    a picture and a question          -> the caption
told     a question                        -> the frozen model's own words, and no picture
joined   a question and a request          -> the frozen model's own words, then [IMG1..r]
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from corpora.chat_requests import Phrasings, asked_for
from gill_errors import InputError
from pipeline.bridge.documents import Document, Drawn, Shown, Words
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.turns import PICTURE, Message, Place
from stages.reply_file import Reply


class ChatDocuments:
    """Writes documents in the turns of one language model.

    Raises:
        ValueError: the language model continues plain text.
    """

    def __init__(
        self, language_model: LanguageModel, phrasings: Phrasings, max_caption_tokens: int
    ) -> None:
        if language_model.turns is None:
            raise InputError("requests and questions are turns: set model.turns: chat")
        self._turns, self._tokenizer = language_model.turns, language_model.tokenizer
        self._phrasings, self._max_tokens = phrasings, max_caption_tokens

    def asked(self, caption: str, picture: int, draws: random.Random) -> Document:
        """A request for picture number `picture` of the batch, in a phrasing that is drawn."""
        text = asked_for(draws.choice(self._phrasings.asked), self._cut(caption)[0])
        return (*self._prompt([Message("user", (text,))]), Drawn(picture))

    def shown(self, caption: str, picture: int, draws: random.Random) -> Document:
        """The picture, a question about it, and its caption as the answer.

        A caption that is cut is not ended: nobody stops in the middle of a sentence.
        """
        question = draws.choice(self._phrasings.shown)
        parts = (PICTURE, question) if question else (PICTURE,)
        text, whole = self._cut(caption)
        answer = self._ids(text) + (self._turns.end_ids if whole else ())
        return (*self._prompt([Message("user", parts)], picture), Words(answer, "words"))

    def told(self, reply: Reply) -> Document:
        """A question and the frozen model's own words: at none of them comes a picture."""
        end = self._turns.end_ids if reply.ended else ()
        return (*self._request(reply), Words(reply.ids + end, "image_token"))

    def joined(self, reply: Reply, picture: int) -> Document:
        """The same with a picture in the place of the end."""
        words = (Words(reply.ids, "image_token"),) if reply.ids else ()
        return (*self._request(reply), *words, Drawn(picture))

    def _request(self, reply: Reply) -> Document:
        return self._prompt([Message(s.role, (s.text,)) for s in reply.request.messages])

    def _prompt(self, messages: Sequence[Message], picture: int = 0) -> Document:
        """Turns up to where the assistant answers."""
        written = self._turns.write_after_start(messages)
        return tuple(
            Shown(picture) if isinstance(part, Place) else Words(tuple(part)) for part in written
        )

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _cut(self, caption: str) -> tuple[str, bool]:
        """A caption of at most so many tokens, and whether that is all of it."""
        ids = self._ids(caption)
        if len(ids) <= self._max_tokens:
            return caption, True
        return self._tokenizer.decode(ids[: self._max_tokens]), False


def usable(replies: Sequence[Reply], stream: Literal["told", "joined"]) -> list[Reply]:
    """The replies of one stream: a picture comes after words that the model ended, and no others.

    A reply without a word and without an end teaches nothing and is left out.
    """
    if stream == "joined":
        return [reply for reply in replies if reply.request.row is not None and reply.ended]
    return [reply for reply in replies if reply.request.row is None and (reply.ids or reply.ended)]
