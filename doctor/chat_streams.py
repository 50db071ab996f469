"""What a chat model's training reads, and its own answers before it. For `stages doctor`.

Lengths are assumptions, as those of captions are: what a template writes around two turns, a
phrasing, a question. An answer is taken to have `training.replies.max_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from corpora.chat_requests import own_questions
from doctor.blueprints import LanguageModelBlueprint
from doctor.memory import Memory, weight_bytes
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.documents import Document, DocumentBatch, Drawn, Shown, Words
from pipeline.bridge.mixed_batch import MixedBatch, is_of_share
from settings.params import Params
from settings.replies import OWN_QUESTIONS

MARKS, PHRASING, QUESTION = 10, 7, 12
"""Tokens of a template around two turns, of a phrasing without its caption, of a question."""
ANSWERED_AT_ONCE = 16


def chat_step(captions: CaptionBatch, shares: Mapping[str, int], answer: int) -> MixedBatch:
    """The same number of turns as captions, each stream in its share of a step.

    Args:
        captions: on the meta device; their lengths and pictures are those of the turns.
        shares: documents of each stream in a step.
        answer: tokens of the frozen model's own answers.
    """
    total = sum(shares.values())
    asked, pictured = shares.get("asked", 0), shares.get("asked", 0) + shares.get("shown", 0)
    # As `stages.chat_batches` lays them: those with a picture evenly mixed, then the others.
    streams = ["asked" if is_of_share(n, asked, pictured) else "shown" for n in range(pictured)]
    streams += [name for name in ("told", "joined") for _ in range(shares.get(name, 0))]
    documents = [
        _document(streams[number * total // len(captions)], number, length, answer)
        for number, length in enumerate(captions.offsets.diff().tolist())
    ]
    return MixedBatch(None, _batch(documents, captions))


def chat_validation(captions: CaptionBatch) -> MixedBatch:
    """Every held-out row once as a request and once as a picture with a question."""
    lengths = captions.offsets.diff().tolist()
    documents = [
        _document(stream, number, length, 0)
        for stream in ("asked", "shown")
        for number, length in enumerate(lengths)
    ]
    return MixedBatch(None, _batch(documents, captions))


def num_replies(params: Params) -> int:
    """Answers that precompute-replies makes of this project's own questions; of a user's file it is
    not known before it is read."""
    section = params.training.replies
    asked = len(own_questions("train")) if section.questions == OWN_QUESTIONS else 0
    return asked + section.joined


def answering_memory(blueprint: LanguageModelBlueprint, answer: int) -> Memory:
    """Of the frozen model that answers in batches; `flop` is per answer."""
    text = blueprint.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * text.hidden_size // text.num_attention_heads
    tokens = MARKS + QUESTION + answer
    states = 2 * text.num_hidden_layers * width * blueprint.dtype.itemsize
    return Memory(
        weights=weight_bytes(blueprint.build().model),
        working=ANSWERED_AT_ONCE * (tokens * states + 4 * text.vocab_size),
        flop=2.0 * blueprint.parameters * tokens,
    )


def _document(stream: str, number: int, caption: int, answer: int) -> Document:
    question, own = _words(MARKS + QUESTION), _words(answer, "image_token")
    match stream:
        case "asked":
            return (_words(MARKS + PHRASING + caption), Drawn(number))
        case "shown":
            return (Shown(number), question, _words(caption, "words"))
        case "told":
            return (question, own)
    return (_words(MARKS + QUESTION + PHRASING + caption), own, Drawn(number))


def _words(count: int, supervised: str = "no") -> Words:
    return Words((0,) * count, supervised)  # type: ignore[arg-type]


def _batch(documents: Sequence[Document], captions: CaptionBatch) -> DocumentBatch:
    return DocumentBatch(
        tuple(documents),
        captions.pooled,
        captions.targets,
        torch.arange(len(captions), device=captions.pooled.device),
        captions.pooled_targets,
    )
