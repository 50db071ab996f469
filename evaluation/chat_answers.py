"""Answers of a chat model to held-out talks, greedy and kept: as it is served, in words, by itself.

A talk is a list of turns; a batch of talks is the same in every run, and saved whole.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from evaluation.pictures import content_of, opened
from evaluation.progress import Meter
from evaluation.sets import Picture
from evaluation.store import EvaluationStore, key_for
from gill.loading import Gill
from pipeline.frozen.turns import ChatRole, Message
from pipeline.talking.answers import IN_TURNS
from pipeline.talking.context import Context
from pipeline.talking.decoding import DecodingSettings, TextPiece, decode
from pipeline.talking.own_words import own_words
from pipeline.talking.reading import Said, embed_turns, see_pictures

ANSWER_TOKENS = 48
"""The answers' first tokens, which are compared."""
_BATCH = 32
_SERVED = IN_TURNS.decoding.model_copy(update={"max_tokens": ANSWER_TOKENS})
_IN_WORDS = _SERVED.model_copy(update={"max_images": 0})


@dataclass(frozen=True)
class Line:
    """What one side says, words and pictures."""

    role: ChatRole
    parts: tuple[str | Picture, ...]


Talk = tuple[Line, ...]
"""It ends with the user's."""


@dataclass(frozen=True)
class ChatAnswer:
    """Words by their ids, and what came of them."""

    ids: tuple[int, ...]
    text: str
    draws: bool
    """Whether a picture came; it ends the answer."""
    ended: bool
    """Whether the model ended it; otherwise it was cut, or a picture came."""

    def says_as(self, other: ChatAnswer) -> bool:
        """Whether it is the same, token for token, and ends alike."""
        return (self.ids, self.draws, self.ended) == (other.ids, other.draws, other.ended)


def question(text: str) -> Talk:
    """A user's only turn."""
    return (Line("user", (text,)),)


class ChatAnswers:
    """Makes answers that are not there yet."""

    def __init__(self, gill: Gill, store: EvaluationStore) -> None:
        self._gill, self._store = gill, store

    def served(self, talks: Sequence[Talk]) -> list[ChatAnswer]:
        """As the service answers by default, with pictures where the model says [IMG1]."""
        return self._made("answers", talks, lambda batch: self._decoded(batch, _SERVED))

    def in_words(self, talks: Sequence[Talk]) -> list[ChatAnswer]:
        """The same with pictures switched off."""
        return self._made("answers in words", talks, lambda batch: self._decoded(batch, _IN_WORDS))

    def own(self, talks: Sequence[Talk]) -> list[ChatAnswer]:
        """The frozen language model's own, by transformers' `generate`, to talks in words."""
        return self._made("the language model's own answers", talks, self._own)

    @torch.no_grad()
    def next_words(self, talks: Sequence[Talk]) -> Float[Tensor, "N V"]:
        """Log probabilities of an answer's first word, the columns of [IMG] left out."""
        found = []
        for first in range(0, len(talks), _BATCH):
            context, prompts = self._read(talks[first : first + _BATCH])
            for row, prompt in enumerate(prompts):
                context.note(row, prompt)
            context.read()
            logits = self._gill.language_model.logits(context.last_hidden)
            found.append(logits.float().log_softmax(-1).cpu())
        return torch.cat(found)

    def _made(
        self,
        what: str,
        talks: Sequence[Talk],
        answer: Callable[[Sequence[Talk]], list[ChatAnswer]],
    ) -> list[ChatAnswer]:
        keys = [key_for(what, ANSWER_TOKENS, _content_of(talk)) for talk in talks]
        spans = [range(i, min(i + _BATCH, len(keys))) for i in range(0, len(keys), _BATCH)]
        todo = [span for span in spans if any(self._store.text(keys[i]) is None for i in span)]
        with Meter(what, sum(map(len, todo)), "answers") as meter:
            for span in todo:
                made = answer([talks[i] for i in span])
                lines = [json.dumps(asdict(one)) for one in made]
                self._store.save_texts({keys[i]: line for i, line in zip(span, lines, strict=True)})
                meter.add(len(span))
        return [_parsed(text) for key in keys if (text := self._store.text(key)) is not None]

    def _decoded(self, talks: Sequence[Talk], settings: DecodingSettings) -> list[ChatAnswer]:
        context, prompts = self._read(talks)
        answers = []
        for one in decode(self._gill.model, context, prompts, settings):
            words = [p.token_ids for p in one.pieces if isinstance(p, TextPiece)]
            draws = bool(one.images)
            ids = tuple(itertools.chain.from_iterable(words))
            answers.append(ChatAnswer(ids, one.text, draws, one.end == "stop"))
        return answers

    def _own(self, talks: Sequence[Talk]) -> list[ChatAnswer]:
        language_model = self._gill.language_model
        assert language_model.turns is not None
        prompts = []
        for talk in talks:
            written = language_model.turns.write(
                [Message(line.role, cast("tuple[str, ...]", line.parts)) for line in talk]
            )
            prompts.append([id_ for ids in written for id_ in cast("tuple[int, ...]", ids)])
        said = own_words(language_model, prompts, ANSWER_TOKENS)
        texts = [language_model.tokenizer.decode(one.ids) for one in said]
        return [
            ChatAnswer(one.ids, text, False, one.ended)
            for one, text in zip(said, texts, strict=True)
        ]

    def _read(self, talks: Sequence[Talk]) -> tuple[Context, list[Float[Tensor, "_ e"]]]:
        """An empty context, and what it is to read of each talk."""
        model = self._gill.model
        contexts = [opened([part for line in talk for part in line.parts]) for talk in talks]
        seen = see_pictures(model, self._gill.encoder, contexts)
        prompts = []
        for talk, parts in zip(talks, map(iter, seen), strict=True):
            said = [
                Said(line.role, tuple(itertools.islice(parts, len(line.parts)))) for line in talk
            ]
            prompts.append(torch.cat([vectors for _, vectors in embed_turns(model, said)]))
        return Context(model.language_model, len(talks)), prompts


def _content_of(talk: Talk) -> list[object]:
    """Of all that an answer depends on, but for the models."""
    return [
        [
            line.role,
            *(
                p if isinstance(p, str) else {"picture": content_of(p.reference)}
                for p in line.parts
            ),
        ]
        for line in talk
    ]


def _parsed(text: str) -> ChatAnswer:
    content = json.loads(text)
    return ChatAnswer(**{**content, "ids": tuple(content["ids"])})
