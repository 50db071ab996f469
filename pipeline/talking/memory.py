"""What a conversation remembers, and how the language model reads it: as one text, or in turns.

A model that continues texts reads one exchange behind the other. What a chat model reads is what
its template writes of all turns, anew with every turn: where that begins as what was read, only
the rest is read.

Letters: n positions, m of them that are left to read, w of words, e language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.talking.answers import ConversationError, SeenPart, Side, ToldPart
from pipeline.talking.context import Context
from pipeline.talking.prefixes import common_length
from pipeline.talking.reading import Said, embed_turns, join_texts, see_pictures
from pipeline.talking.speaker import Speaker


@dataclass(frozen=True, eq=False)
class Heard:
    """One turn, read into vectors."""

    embeddings: Float[Tensor, "n e"]
    """Of the turn alone; a chat model's with all that its template writes around it."""
    ends_with_text: bool
    said: Said | None = None


@dataclass
class TextMemory:
    """Of a language model that continues texts."""

    _exchanges: list[Tensor] = field(default_factory=list)
    _ends_with_text: bool = False

    @property
    def num_turns(self) -> int:
        """Exchanges that are remembered."""
        return len(self._exchanges)

    def num_positions(self, speaker: Speaker) -> int:
        """Positions that they take."""
        return sum(map(len, self._exchanges))

    def hear(self, speaker: Speaker, turn: Sequence[SeenPart]) -> Heard:
        """Read a turn that comes next."""
        parts = speaker.embed(turn, after_text=self._ends_with_text)
        vectors = [embedding for _, embedding in parts]
        embeddings = torch.cat(vectors) if vectors else torch.zeros(0, speaker.heads.sizes.e)
        return Heard(embeddings, _ends_with_text(turn))

    def inputs(self, speaker: Speaker, turn: Heard) -> Float[Tensor, "n e"]:
        """Start ids, all exchanges, and the turn."""
        return torch.cat([speaker.start(), *self._exchanges, turn.embeddings])

    def left_to_read(
        self, context: Context, inputs: Float[Tensor, "n e"], turn: Heard
    ) -> Float[Tensor, "m e"]:
        """The turn: the context has read all before it."""
        return turn.embeddings

    def forget_oldest(self) -> None:
        """Forget an exchange."""
        self._exchanges.pop(0)

    def recall(self, speaker: Speaker, exchange: Sequence[ToldPart]) -> bool:
        """Remember what was said elsewhere, whoever said it; whether there was anything."""
        heard = self.hear(speaker, [part for part in exchange if not isinstance(part, Side)])
        if not len(heard.embeddings):
            return False
        self._exchanges.append(heard.embeddings)
        self._ends_with_text = heard.ends_with_text
        return True

    def keep(
        self,
        turn: Heard,
        inputs: Float[Tensor, "n e"],
        words: Float[Tensor, "w e"],
        told: Sequence[str | Tensor],
        ends_with_text: bool,
    ) -> Float[Tensor, "all e"]:
        """Remember a turn and its answer; gives what the context has read by now."""
        self._exchanges.append(torch.cat([turn.embeddings, words]))
        self._ends_with_text = ends_with_text
        return torch.cat([inputs, words])


@dataclass
class ChatMemory:
    """Of a chat model. `system_prompt` goes before the one of the run."""

    system_prompt: str | None = None
    _exchanges: list[list[Said]] = field(default_factory=list)
    _read: Tensor | None = None

    @property
    def num_turns(self) -> int:
        """Exchanges that are remembered."""
        return len(self._exchanges)

    def num_positions(self, speaker: Speaker) -> int:
        """Positions that they take, with what every talk begins with."""
        return len(self._embed(speaker, [], answering=False)) if self._exchanges else 0

    def hear(self, speaker: Speaker, turn: Sequence[SeenPart]) -> Heard:
        """Read a turn that comes next, as the first of a talk."""
        if any(isinstance(part, Side) for part in turn):
            raise ConversationError("the turn to answer is the user's: end with what the user says")
        said = _said(speaker, "user", turn)
        if not said.parts:
            return Heard(torch.zeros(0, speaker.heads.sizes.e), False, said)
        return Heard(_cat(embed_turns(speaker.model, [*self._system(), said])), False, said)

    def inputs(self, speaker: Speaker, turn: Heard) -> Float[Tensor, "n e"]:
        """What the template writes of all turns, up to the answer."""
        assert turn.said is not None
        return self._embed(speaker, [turn.said])

    def left_to_read(
        self, context: Context, inputs: Float[Tensor, "n e"], turn: Heard
    ) -> Float[Tensor, "m e"]:
        """What is behind the first place where `inputs` differ from what was read."""
        assert self._read is not None
        known = common_length(self._read, inputs[:-1])
        context.rewind(known)
        return inputs[known:]

    def forget_oldest(self) -> None:
        """Forget an exchange."""
        self._exchanges.pop(0)

    def recall(self, speaker: Speaker, exchange: Sequence[ToldPart]) -> bool:
        """Remember what was said elsewhere; whether there was anything."""
        talk: list[Said] = []
        sides: list[tuple[Side, list[SeenPart]]] = [(Side.USER, [])]
        for part in exchange:
            if not isinstance(part, Side):
                sides[-1][1].append(part)
            elif part is not sides[-1][0]:
                sides.append((part, []))
        for side, parts in sides:
            # An answer may be a picture alone, of which nothing is remembered; no question is.
            if parts or side is Side.ASSISTANT:
                talk.append(_said(speaker, side.value, parts))
        if talk:
            self._embed(speaker, talk, answering=False)  # or the template refuses what was said
            self._exchanges.append(talk)
        return bool(talk)

    def keep(
        self,
        turn: Heard,
        inputs: Float[Tensor, "n e"],
        words: Float[Tensor, "w e"],
        told: Sequence[str | Tensor],
        ends_with_text: bool,
    ) -> Float[Tensor, "all e"]:
        """Remember a turn and its answer; gives what the context has read by now."""
        assert turn.said is not None
        self._exchanges.append([turn.said, Said("assistant", _joined(told))])
        self._read = torch.cat([inputs, words])
        return self._read

    def _system(self) -> list[Said]:
        return [] if self.system_prompt is None else [Said("system", (self.system_prompt,))]

    def _embed(
        self, speaker: Speaker, further: list[Said], *, answering: bool = True
    ) -> Float[Tensor, "n e"]:
        said = [*self._system(), *(said for one in self._exchanges for said in one), *further]
        return _cat(embed_turns(speaker.model, said, answering=answering))


Memory = TextMemory | ChatMemory


def _said(speaker: Speaker, role: str, parts: Sequence[SeenPart]) -> Said:
    [seen] = see_pictures(speaker.model, speaker.encoder, [parts])
    return Said(role, tuple(join_texts(seen)))  # type: ignore[arg-type]


def _joined(told: Sequence[str | Tensor]) -> tuple[str | Tensor, ...]:
    """Pieces of text that stand together as one; at least an empty one."""
    parts: list[str | Tensor] = []
    for piece in told:
        if isinstance(piece, str) and parts and isinstance(last := parts[-1], str):
            parts[-1] = last + piece
        else:
            parts.append(piece)
    return tuple(parts) or ("",)


def _cat(parts: Sequence[tuple[Tensor | None, Tensor]]) -> Float[Tensor, "n e"]:
    return torch.cat([vectors for _, vectors in parts])


def _ends_with_text(parts: Sequence[SeenPart]) -> bool:
    """Whether a text that comes next goes on from another, and needs a space."""
    last = next((part for part in reversed(parts) if not isinstance(part, str) or part), None)
    return isinstance(last, str) and not last[-1].isspace()
