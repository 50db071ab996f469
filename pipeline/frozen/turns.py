"""Turns as a chat model knows them: its tokenizer's own template writes them, pictures in place.

    [Message("user", ("draw ", PICTURE, " at night"))]
        ->  [(1, 9690, ...), PICTURE, (418, 2264, 2, ..., 520, 9531, 198)]

What is written is what transformers' `apply_chat_template(tokenize=True)` writes, token for token,
with two differences. A picture is a place of its own, for k vectors. And the words of a turn are
words: what spells a control token in them (`<|im_end|>`, or a template's own `[INST]`) is read as
text, never as the end or the beginning of a turn.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from gill_errors import InputError
from pipeline.frozen.backbones import BackboneError, ChatSettings
from pipeline.frozen.plain_text import read_as_text, renamed

ChatRole = Literal["system", "user", "assistant"]


class Place(Enum):
    """Where something other than words stands in a turn."""

    PICTURE = "picture"


PICTURE = Place.PICTURE

Written = list[tuple[int, ...] | Place]
"""Token ids and places, in reading order; no two neighbours are both ids."""


class TurnError(InputError):
    """Turns that the template of a language model does not write: what it says about them."""


@dataclass(frozen=True)
class Message:
    """What one side says: words, and places of pictures."""

    role: ChatRole
    parts: tuple[str | Place, ...]


class ChatTemplate:
    """The chat template of one tokenizer, with a system prompt and options of its own.

    Attributes:
        start_ids: what every text of this system prompt begins with, up to the last control token
            that all have in common; `write_after_start` leaves it out.
        end_ids: control tokens that end an answer, as the template writes one.
    """

    def __init__(self, tokenizer: Any, settings: ChatSettings, name: str) -> None:
        """`tokenizer` is one of transformers; `name` is the language model's, for messages.

        Raises:
            BackboneError: there is no template, or it fails on a question and its answer, has no
                place for the system prompt, drops a picture or writes it twice. Each says which
                file or key is at fault.
        """
        self._tokenizer, self.settings, self._name = tokenizer, settings, name
        if getattr(tokenizer, "chat_template", None) is None:
            raise BackboneError(
                f"model.turns: chat: {name} has no chat template (chat_template.jinja, or "
                "chat_template in tokenizer_config.json): name an instruction-tuned model, or "
                "set model.turns: plain"
            )
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise BackboneError(
                f"model.turns: chat: {name} has no tokenizer.json, which chat needs"
            )
        self._spelled = _Spelling(tokenizer)
        asked = Message("user", ("a",))
        self._require("is asked a question", [asked])
        self._require("is shown a picture", [Message("user", (PICTURE, "a"))])
        self._require("goes on", [asked, Message("assistant", ("b",)), asked])
        self._spelled.learn_marks(self._literals())
        self.start_ids = self._common_start()
        self.end_ids = self._ends()

    def write(self, messages: Sequence[Message], *, answering: bool = True) -> Written:
        """All ids of a conversation, start ids included; with `answering` the assistant is next.

        The system prompt of the settings comes first, where no message gives another.

        Raises:
            TurnError: the template refuses these turns, or loses a picture.
        """
        said = self._with_system(messages)
        texts = self._hidden(said)
        rendered = self._render(texts, answering)
        wanted = sum(part is PICTURE for message in said for part in message.parts)
        if (written := self._spelled.places(rendered)) != list(range(wanted)):
            raise TurnError(
                f"the chat template of {self._name} writes the pictures {written} of {wanted}: it "
                "drops, doubles or moves them"
            )
        prompts = (text["content"] for text in texts if text["role"] == "system")
        # Some write it before the last question alone.
        if answering and not all(prompt.strip() in rendered for prompt in prompts):
            raise TurnError(f"the chat template of {self._name} does not write a system prompt")
        return self._spelled.read(rendered)

    def write_after_start(self, messages: Sequence[Message], *, answering: bool = True) -> Written:
        """`write` without `start_ids`, for what is read after them.

        Raises:
            TurnError: as `write`; or the conversation has another system prompt, and does not begin
                with them.
        """
        written = self.write(messages, answering=answering)
        count = len(self.start_ids)
        if count == 0:
            return written
        first = written[0]
        if isinstance(first, Place) or first[:count] != self.start_ids:
            raise TurnError(f"these turns do not begin as {self._name} begins its turns")
        rest = first[count:]
        return [rest, *written[1:]] if rest else written[1:]

    # --- details -----------------------------------------------------------------------------

    @property
    def _template(self) -> str:
        template = str(self._tokenizer.get_chat_template())
        return _DATED + template if "strftime_now" in template else template

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        prompt = self.settings.system_prompt
        if prompt is None or (messages and messages[0].role == "system"):
            return list(messages)
        return [Message("system", (prompt,)), *messages]

    def _hidden(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages as a template reads them, their places numbered through."""
        texts, number = [], 0
        for message in messages:
            texts.append(
                {"role": message.role, "content": self._spelled.hide(message.parts, number)}
            )
            number += sum(part is PICTURE for part in message.parts)
        return texts

    def _render(self, texts: list[dict[str, str]], answering: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    texts,
                    tokenize=False,
                    chat_template=self._template,
                    add_generation_prompt=answering,
                    **self.settings.template_options,
                )
            )
        except Exception as error:  # whatever a template stumbles over, or raises itself
            said = " ".join(str(error).split())[:200]
            roles = ", ".join(text["role"] for text in texts)
            raise TurnError(f"the chat template of {self._name} refuses {roles}: {said}") from None

    def _require(
        self, when: str, messages: Sequence[Message], *, answering: bool = True
    ) -> Written:
        """What is written of turns that every template must be able to write."""
        try:
            written = self.write(messages, answering=answering)
        except TurnError as error:
            if self.settings.system_prompt is not None and self._writes_without_system(messages):
                raise BackboneError(
                    f"model.system_prompt: {self._name} has no place for one: {error}"
                ) from None
            raise BackboneError(f"model.turns: chat: where a user {when}: {error}") from None
        return written

    def _writes_without_system(self, messages: Sequence[Message]) -> bool:
        try:
            self._render(self._hidden(messages), True)
        except TurnError:
            return False
        return True

    def _literals(self) -> list[str]:
        """The template's own words, around turns that are nothing but places."""
        turn = Message("user", (PICTURE,))
        said = [turn, Message("assistant", (PICTURE,)), turn]
        if self.settings.system_prompt is not None:
            said = [Message("system", (PICTURE,)), *said]
        return self._spelled.between_places(self._render(self._hidden(said), True))

    def _common_start(self) -> tuple[int, ...]:
        begins = []
        for parts in ((PICTURE,), ("a",), ("\n",), ("1",)):
            first = self.write([Message("user", parts)])[0]
            begins.append(() if isinstance(first, Place) else first)
        shortest = min(begins, key=len)
        same = 0
        while same < len(shortest) and len({ids[same] for ids in begins}) == 1:
            same += 1
        control = [i for i in range(same) if shortest[i] in self._spelled.control_ids]
        return shortest[: control[-1] + 1] if control else ()

    def _ends(self) -> tuple[int, ...]:
        """The first control token behind an answer; none where the template writes none."""
        asked = Message("user", ("a",))
        told = [
            self.write([asked, Message("assistant", (answer,))], answering=False)[-1]
            for answer in ("b", "1 c")
        ]
        one, other = (() if isinstance(ids, Place) else ids for ids in told)
        same = 0
        while same < min(len(one), len(other)) and one[-same - 1] == other[-same - 1]:
            same += 1
        behind = [id_ for id_ in one[len(one) - same :] if id_ in self._spelled.control_ids]
        return tuple(behind[:1])


# Some templates write today's date, which would be another prompt every day. This is what that of
# Llama 3.1 writes where it is told none.
_DATED = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"


class _Spelling:
    """How turns go through a template as text: places and control words under names of their own.

    A copy of the tokenizer knows these names as tokens, and reads control words letter by letter.
    The names are drawn anew for each copy: no text can hold one.
    """

    def __init__(self, tokenizer: Any) -> None:
        control = {
            id_: token
            for id_, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip()
        }
        self.control_ids = frozenset(control)
        nonce = f"x{secrets.token_hex(8)}x"
        self._place, self._nothing = f"{nonce}place", f"{nonce}nothing"
        self._ours = {token.content: f"{nonce}ours{id_}x" for id_, token in control.items()}
        self._theirs = {word: f"{nonce}text{n}x" for n, word in enumerate(self._ours)}
        self._marks: list[str] = []
        self._backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        read_as_text(self._backend, list(control.values()))
        self._backend.encode_special_tokens = True
        self._backend.add_tokens(
            [
                *(renamed(token, self._ours[token.content]) for token in control.values()),
                AddedToken(self._place, normalized=False),
                AddedToken(self._nothing, normalized=False),
            ]
        )
        self._meaning: dict[int | None, int] = {
            self._backend.token_to_id(self._ours[token.content]): id_
            for id_, token in control.items()
        }
        self._place_id = self._backend.token_to_id(self._place)
        self._nothing_id = self._backend.token_to_id(self._nothing)
        self._numbered = re.compile(f"{self._place}(\\d+)x")

    def learn_marks(self, literals: Sequence[str]) -> None:
        """Marks of turns that are no tokens but a template's own text, such as `[INST]`."""
        found = {mark for text in literals for mark in _MARK.findall(text)}
        self._marks = sorted(found - self._ours.keys(), key=len, reverse=True)

    def hide(self, parts: Sequence[str | Place], first: int) -> str:
        """The parts of one turn as text without control words; its places count from `first`."""
        text, number = "", first
        for part in parts:
            if isinstance(part, Place):
                text += f"{self._place}{number}x"
                number += 1
            else:
                text += _replaced(part, self._theirs | {m: self._apart(m) for m in self._marks})
        return text

    def places(self, rendered: str) -> list[int]:
        """The numbers of the places in a rendered text, in order."""
        return [int(number) for number in self._numbered.findall(rendered)]

    def between_places(self, rendered: str) -> list[str]:
        """The text of the template around places."""
        return self._numbered.sub("\0", rendered).split("\0")

    def read(self, rendered: str) -> Written:
        """Ids and places of a rendered text. Control words in it are the template's own."""
        text = _replaced(rendered, self._ours | {name: w for w, name in self._theirs.items()})
        text = self._numbered.sub(self._place, text)
        written: Written = []
        ids: list[int] = []
        for id_ in self._backend.encode(text, add_special_tokens=False).ids:
            if id_ == self._place_id:
                written += [tuple(ids), PICTURE] if ids else [PICTURE]
                ids = []
            elif id_ != self._nothing_id:
                ids.append(self._meaning.get(id_, id_))
        return [*written, tuple(ids)] if ids else written

    def _apart(self, mark: str) -> str:
        return self._nothing.join(mark)


# In brackets as `[INST]`, `<<SYS>>`, `<start_of_turn>`, `<|im_end|>`.
_MARK = re.compile(r"\[/?[A-Z_]{2,}\]|<{1,2}[/|]?[A-Za-z_]{2,}\|?>{1,2}")


def _replaced(text: str, names: dict[str, str]) -> str:
    """`text` with every word of `names` as its name, the longest first."""
    if not names:
        return text
    words = "|".join(re.escape(word) for word in sorted(names, key=len, reverse=True))
    return re.sub(words, lambda match: names[match[0]], text)
