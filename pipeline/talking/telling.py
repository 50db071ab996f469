"""Stories with pictures: a whole text that gets pictures, or a beginning that the model continues.

    "we went out. it rained. we came home."  ->  Text, GeneratedImage, Text, Text, GeneratedImage

A whole text is read sentence by sentence. Where its pictures stand is decided first, from the words
alone: behind sentences after which [IMG1] is likelier than any word, evenly spread ones where there
are more of these than pictures. Then each picture is asked for, with all before it in the context:
the words, and of the pictures what `read_back` says. Of a text that the language model's positions
cannot hold the oldest sentences are forgotten, as in any conversation.

A beginning is one turn whose answer has several pictures: they come where the model says [IMG1],
the first perhaps at once, and never two without words between them.

Letters: T tokens of a sentence.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from gill_records import Record
from pipeline.talking.answers import ConversationError, Ended, Event, ReplySettings, Started, Text
from pipeline.talking.context import Context
from pipeline.talking.conversation import CERTAIN, Conversation
from pipeline.talking.decoding import EndReason, next_logits
from pipeline.talking.reading import parts_of
from pipeline.talking.sentences import sentences_of
from pipeline.talking.speaker import Speaker

LONGEST_SENTENCE = 60
"""Tokens that a sentence of the model has on average, at most."""


class TellingSettings(Record):
    """How a story comes about."""

    pictures: int = Field(4, ge=1, le=64, description="most pictures of the story")
    places: Literal["model", "even"] = Field(
        "model",
        description="model: behind sentences after which the model says [IMG1]; of more of these "
        "than pictures, evenly spread ones. even: evenly spread over all sentences; of sentences "
        "that the model adds, behind the first ones",
    )
    added_sentences: int = Field(
        0,
        ge=0,
        le=64,
        description="sentences that the model adds, which then get the pictures; 0: the text is a "
        "whole story",
    )


def tell(
    speaker: Speaker, text: str, settings: TellingSettings, reply: ReplySettings
) -> Generator[Event, None, None]:
    """The story piece by piece: Text, PictureProgress, pictures, and Ended.

    Paragraphs of the text are parted by empty lines and stay so. Picture n has the seed
    `reply.seed` + n (times `candidates`), no candidate is retrieved twice. Of `reply`, `want`
    `text` is refused; its decoding says how words are sampled and what is read back.

    Raises ConversationError for a text without words, and a sentence that the language model's
    positions cannot hold, before anything is made.
    """
    parts_of(text)
    paragraphs = sentences_of(text)
    if not paragraphs:
        raise ConversationError("the story has no words: give a text, or a beginning")
    if reply.want == "text":
        raise ConversationError("a story has pictures: want auto, retrieve or generate")
    if settings.added_sentences:
        yield from _go_on(speaker, paragraphs, settings, reply)
    else:
        yield from _illustrate(speaker, paragraphs, settings, reply)


def _illustrate(
    speaker: Speaker,
    paragraphs: Sequence[Sequence[str]],
    settings: TellingSettings,
    reply: ReplySettings,
) -> Generator[Event, None, None]:
    sentences = [sentence for paragraph in paragraphs for sentence in paragraph]
    places = set(picture_places(speaker, sentences, settings))
    changes = {"max_tokens": 1, "max_images": 1, "min_tokens_before_image": 0, "stop": ()}
    one_picture = reply.model_copy(
        update={
            "decoding": reply.decoding.model_copy(
                update={**changes, "stop_after_images": True, "image_bias": CERTAIN}
            )
        }
    )
    conversation = Conversation(speaker)
    conversation.prepare([sentences[0]], one_picture)  # refuses what cannot be had at once
    tokens, number = 0, 0
    reason: EndReason = "stop"
    since: list[str] = []
    for paragraph in paragraphs:
        before = "\n\n" if number else ""
        for sentence in paragraph:
            yield Text(before + sentence)
            before = " "
            since.append(sentence)
            number += 1
            if number - 1 not in places:
                continue
            _recall_beginning(conversation, since)
            for event in conversation.stream(since, one_picture):
                if isinstance(event, Ended):
                    tokens, reason = tokens + event.tokens, event.reason
                elif not isinstance(event, Started):
                    yield event
            since = []
    yield Ended("cancelled" if reason == "cancelled" else "stop", tokens)


def _recall_beginning(conversation: Conversation, sentences: list[str]) -> None:
    """Take sentences off the front, into what may be forgotten, until the others are a turn."""
    speaker = conversation.speaker
    room = speaker.language_model.max_positions // 2
    while len(sentences) > 1 and len(speaker.embed(sentences)[0][1]) > room:
        conversation.recall([sentences.pop(0)])


def _go_on(
    speaker: Speaker,
    paragraphs: Sequence[Sequence[str]],
    settings: TellingSettings,
    reply: ReplySettings,
) -> Generator[Event, None, None]:
    beginning = "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)
    longest = settings.pictures + settings.added_sentences * LONGEST_SENTENCE
    changes: dict[str, Any] = {
        "max_tokens": min(longest, speaker.language_model.max_positions // 2),
        "finish_sentence": LONGEST_SENTENCE,
        "max_sentences": settings.added_sentences,
        "max_images": settings.pictures,
        "words_between_images": True,
        "stop_after_images": False,
        "stop_at_newline": False,
    }
    if settings.places == "even":
        changes["image_bias"] = CERTAIN
    decoding = reply.decoding.model_copy(update=changes)
    going_on = reply.model_copy(update={"decoding": decoding})
    conversation = Conversation(speaker)
    conversation.prepare([beginning], going_on)
    yield Text(beginning)
    for event in conversation.stream([beginning], going_on):
        if not isinstance(event, Started):
            yield event


def picture_places(
    speaker: Speaker, sentences: Sequence[str], settings: TellingSettings
) -> list[int]:
    """The sentences behind which pictures stand, by their numbers from 0, in order.

    A chat model says [IMG1] in its own turns alone: its pictures are evenly spread.
    """
    places = list(range(len(sentences)))
    preferences = image_preferences(speaker, sentences)
    if settings.places == "model" and speaker.language_model.turns is None:
        places = [n for n, preference in enumerate(preferences) if float(preference[-1]) > 0]
    return evenly_spread(places, settings.pictures)


def evenly_spread(places: Sequence[int], number: int) -> list[int]:
    """At most `number` of the places, the last one among them; all where there are no more.

    evenly_spread([0, 1, 2, 3, 4], 3)  ->  [1, 2, 4]
    """
    count = min(number, len(places))
    return [places[round((n + 1) * len(places) / count) - 1] for n in range(count)]


@torch.no_grad()
def image_preferences(speaker: Speaker, sentences: Sequence[str]) -> list[Float[Tensor, " T"]]:
    """Per sentence, behind each of its tokens, by how much the logit of [IMG1] is above that of the
    likeliest word, with the sentences before it in the context.

    Above 0 the model says [IMG1]. Where positions run out, reading begins anew with the sentences
    that fit into half of them.

    Raises ConversationError for a sentence that the positions cannot hold.
    """
    parts = [
        speaker.embed([sentence], after_text=number > 0)[0][1]
        for number, sentence in enumerate(sentences)
    ]
    start = speaker.start()
    limit = speaker.language_model.max_positions - len(start) - speaker.heads.sizes.r
    for number, part in enumerate(parts, 1):
        if len(part) > limit:
            raise ConversationError(
                f"sentence {number} takes {len(part)} positions of the language model, which has "
                f"{limit} for it: end it earlier"
            )
    preferences: list[Tensor] = []
    context = Context(speaker.language_model)
    context.note(0, start)
    for number, part in enumerate(parts):
        if context.room(0) < len(part):
            context = Context(speaker.language_model)
            context.note(0, start)
            kept: list[Tensor] = []
            for before in reversed(parts[:number]):
                if sum(map(len, [*kept, before, part])) > limit // 2:
                    break
                kept.insert(0, before)
            for before in kept:
                context.note(0, before)
        context.note(0, part)
        logits = next_logits(speaker.model, context.read()[0, -len(part) :])
        preferences.append((logits[:, -1] - logits[:, :-1].amax(dim=1)).cpu())
    return preferences
