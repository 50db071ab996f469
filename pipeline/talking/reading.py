"""How interleaved texts and pictures are read: the one way, in talks, retrieval and evaluation.

    ["how does", "this look", picture]  ->  ids and vectors [n, e] of "how does this look", and
                                            k vectors of the picture

Letters: N contexts, n positions of a part, e language-model width, r [IMG] tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.turns import PICTURE, ChatRole, Message, Place, TurnError
from pipeline.frozen.visual_encoder import VisualEncoder
from pipeline.talking.answers import ConversationError, ImageTokens, SeenPart

Embedded = tuple[Int64[Tensor, " _"] | None, Float[Tensor, "_ e"]]
"""A part's ids (None for a picture) and its input vectors, k of them for a picture."""

_Picture = TypeVar("_Picture", Image.Image, Tensor, Image.Image | Tensor)


@dataclass(frozen=True, eq=False)
class Said:
    """What one side said: words, and pictures as the k vectors [k, e] that stand for each."""

    role: ChatRole
    parts: tuple[str | Tensor, ...]


@torch.no_grad()
def embed_contexts(
    model: MultimodalLanguageModel,
    encoder: VisualEncoder,
    contexts: Sequence[Sequence[SeenPart]],
    *,
    after_text: bool = False,
) -> list[list[Embedded]]:
    """Per context its parts as a language model reads them that continues texts; all pictures are
    encoded in one go.

    Neighbouring texts are one part, set off by one space, as captions of one story are in training;
    beside pictures none is added. `after_text`: so is a text that begins a context.

    Raises ConversationError as `parts_of` does.
    """
    language_model = model.language_model

    def embed(part: str | Tensor) -> Embedded:
        if not isinstance(part, str):
            return None, part
        tokens = language_model.tokenizer(part, add_special_tokens=False)["input_ids"]
        return _embedded(language_model, tokens)

    seen = see_pictures(model, encoder, contexts)
    return [[embed(part) for part in join_texts(context, after_text)] for context in seen]


@torch.no_grad()
def embed_turns(
    model: MultimodalLanguageModel, talk: Sequence[Said], *, answering: bool = True
) -> list[Embedded]:
    """A talk as a chat model reads it, from its start; with `answering` the assistant is next.

    Raises ConversationError where the template of the model refuses these turns.
    """
    language_model = model.language_model
    assert language_model.turns is not None
    messages = [
        Message(one.role, tuple(p if isinstance(p, str) else PICTURE for p in one.parts))
        for one in talk
    ]
    try:
        written = language_model.turns.write(messages, answering=answering)
    except TurnError as error:
        raise ConversationError(str(error)) from None
    pictures = (part for one in talk for part in one.parts if not isinstance(part, str))
    return [
        (None, next(pictures)) if isinstance(part, Place) else _embedded(language_model, part)
        for part in written
    ]


@torch.no_grad()
def see_pictures(
    model: MultimodalLanguageModel, encoder: VisualEncoder, contexts: Sequence[Sequence[SeenPart]]
) -> list[list[str | Tensor]]:
    """The parts of each context with k vectors [k, e] for each picture; all are encoded in one go.

    Raises ConversationError as `parts_of` does.
    """
    contexts = [parts_of(context) for context in contexts]
    pictures = [part for context in contexts for part in context if isinstance(part, Image.Image)]
    seen = iter(encoder.encode_pictures(pictures) if pictures else ())
    pooled = [
        next(seen) if isinstance(part, Image.Image) else part
        for context in contexts
        for part in context
        if not isinstance(part, str | ImageTokens)
    ]
    prefixes: Iterator[Tensor] = iter(())
    if pooled:
        for vector in pooled:
            if vector.shape != (encoder.width,):
                raise ConversationError(
                    f"a picture's vector is {list(vector.shape)}; this visual encoder's are "
                    f"[{encoder.width}]"
                )
        device = model.language_model.device
        vectors = [vector.to(device, torch.float32) for vector in pooled]
        prefixes = iter(model.visual_prefix(torch.stack(vectors)))
    return [
        [
            part
            if isinstance(part, str)
            else model.heads.image_embeddings
            if isinstance(part, ImageTokens)
            else next(prefixes)
            for part in context
        ]
        for context in contexts
    ]


@torch.no_grad()
def read_contexts(
    model: MultimodalLanguageModel,
    encoder: VisualEncoder,
    contexts: Sequence[Sequence[SeenPart]],
    batch_size: int = 32,
) -> Float[Tensor, "N r e"]:
    """Hidden states of the [IMG] tokens appended to each context, which stands alone.

    A chat model reads a context as a turn of its user, and the [IMG] tokens are the answer. A
    context that passes the language model's positions loses tokens of its beginning, never the end.
    """
    language_model = model.language_model
    room = language_model.max_positions - model.heads.sizes.r
    hidden: list[Tensor] = []
    for first in range(0, len(contexts), batch_size):
        batch = contexts[first : first + batch_size]
        if language_model.turns is None:
            start = _embedded(language_model, language_model.start_ids)
            read = [[start, *parts] for parts in embed_contexts(model, encoder, batch)]
        else:
            read = [
                _opened(model, embed_turns(model, [Said("user", tuple(join_texts(parts)))]))
                for parts in see_pictures(model, encoder, batch)
            ]
        kept = [[start, *_drop_beginning(parts, room - len(start))] for (_, start), *parts in read]
        hidden.append(model.image_hidden(kept))
    return torch.cat(hidden)


def _opened(model: MultimodalLanguageModel, parts: list[Embedded]) -> list[Embedded]:
    """The parts of a talk, what opens its first turn as a part of its own."""
    (ids, vectors), *rest = parts
    if ids is None:
        return [(None, vectors[:0]), *parts]
    nothing = vectors.new_zeros(0, vectors.shape[1])
    opening, _ = embed_turns(model, [Said("user", (nothing,))])[0]
    assert opening is not None
    # Words may have grown together with a line break before them: then all that is certain.
    alike = ids[: len(opening)].equal(opening)
    count = len(opening) if alike else len(model.language_model.start_ids)
    return [(ids[:count], vectors[:count]), (ids[count:], vectors[count:]), *rest]


def _embedded(language_model: LanguageModel, ids: Sequence[int]) -> Embedded:
    tokens = torch.tensor(ids, dtype=torch.int64)
    return tokens, language_model.embed(tokens)


def parts_of(turn: object) -> Sequence[SeenPart]:
    """The parts of a turn, which may be a single one.

    Raises ConversationError for anything else, and for a part that is neither text of whole
    characters nor a picture that can be read.
    """
    if isinstance(turn, str | Image.Image):
        turn = [turn]
    if not isinstance(turn, list | tuple):
        raise ConversationError(f"the turn is {_described(turn)}; give text, a picture or a list")
    for number, part in enumerate(turn, 1):
        if not isinstance(part, str | Image.Image | Tensor | ImageTokens):
            raise ConversationError(f"part {number} of the turn is {_described(part)}")
        if isinstance(part, Image.Image):
            _refuse_unreadable(part, f"part {number} of the turn")
        if isinstance(part, str):
            refuse_broken_text(part, f"part {number} of the turn")
    return turn


def refuse_broken_text(text: str, what: str) -> None:
    """Raise ConversationError for half a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"{what} is not Unicode: {error.reason} at letter {error.start + 1}"
        ) from None


def _refuse_unreadable(picture: Image.Image, what: str) -> None:
    if not min(picture.size):
        raise ConversationError(f"{what} is a picture of {picture.width} x {picture.height} pixels")
    try:
        picture.load()
    except Exception as error:  # its file is closed or damaged; plugins raise what they stumble on
        raise ConversationError(f"{what} is a picture that cannot be read: {error}") from None


def _described(thing: object) -> str:
    hints = {
        "Path": "PIL.Image.open reads pictures, read_text words",
        "ndarray": "PIL.Image.fromarray makes a picture of it",
    }
    kinds = [kind.__name__ for kind in type(thing).__mro__]
    hint = next((text for kind, text in hints.items() if kind in kinds), "")
    named = f"a {type(thing).__name__}, neither text (str) nor picture (PIL.Image.Image)"
    return f"{named}: {hint}" if hint else named


def join_texts(context: Sequence[str | _Picture], after_text: bool = False) -> list[str | _Picture]:
    """Neighbouring texts as one, with one space between them where there is none.

    ["a b", "c", picture, "d", "\\ne"] -> ["a b c", picture, "d\\ne"]
    """
    joined: list[str | _Picture] = []
    open_end = after_text  # whether a text that comes now goes on from another
    for part in context:
        if not isinstance(part, str):
            joined.append(part)
            open_end = False
        elif part:
            text = f" {part}" if open_end and not part[0].isspace() else part
            open_end = not part[-1].isspace()
            if joined and isinstance(last := joined[-1], str):
                joined[-1] = last + text
            else:
                joined.append(text)
    return joined


def _drop_beginning(parts: Sequence[Embedded], room: int) -> list[Tensor]:
    """Cut whole pictures and single words off the front until at most `room` positions remain."""
    excess = sum(len(vectors) for _, vectors in parts) - room
    kept: list[Tensor] = []
    for ids, vectors in parts:
        lost = 0
        if excess > 0:
            lost = len(vectors) if ids is None else min(excess, len(vectors))
        excess -= lost
        kept.append(vectors[lost:])
    return kept
