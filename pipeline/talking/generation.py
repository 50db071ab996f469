"""Contexts to pictures in bulk: what the evaluations of section 4 have in common.

GILL reads interleaved text and pictures, the generator's own text encoder reads words in their
place. Every example has its own seed, so that a result does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.image_generator import ImageGenerator
from pipeline.frozen.text_conditioner import Conditioning, TextConditioner
from pipeline.frozen.visual_encoder import VisualEncoder
from pipeline.settings import GenerationSettings


@torch.no_grad()
def read_contexts(
    model: MultimodalLanguageModel,
    encoder: VisualEncoder,
    contexts: Sequence[Sequence[str | Image.Image]],
    batch_size: int = 32,
) -> Float[Tensor, "N r e"]:
    """Hidden states of the [IMG] tokens appended to each context.

    Neighbouring texts are joined by one space. A context that passes the language model's positions
    loses tokens of its beginning, never the end.
    """
    language_model = model.language_model
    room = language_model.max_positions - model.heads.sizes.r - len(language_model.start_ids)
    start = torch.tensor(language_model.start_ids, dtype=torch.int64)
    hidden: list[Tensor] = []
    for first in range(0, len(contexts), batch_size):
        batch = []
        for parts in _embedded(model, encoder, contexts[first : first + batch_size]):
            kept = _drop_beginning(parts, room)
            batch.append([start, *kept] if len(start) else kept)
        hidden.append(model.image_hidden(batch))
    return torch.cat(hidden)


def _embedded(
    model: MultimodalLanguageModel,
    encoder: VisualEncoder,
    contexts: Sequence[Sequence[str | Image.Image]],
) -> list[list[Tensor]]:
    """Per context its texts as ids and its pictures as visual prefixes; all pictures in one go."""
    pictures = [part for context in contexts for part in context if not isinstance(part, str)]
    prefixes: Iterator[Tensor] = iter(())
    if pictures:
        pooled = encoder.encode_pictures(pictures).to(model.language_model.device, torch.float32)
        prefixes = iter(model.visual_prefix(pooled))
    tokenizer = model.language_model.tokenizer

    def embed(part: str | Image.Image) -> Tensor:
        if not isinstance(part, str):
            return next(prefixes)
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    return [[embed(part) for part in join_texts(context)] for context in contexts]


def join_texts(context: Sequence[str | Image.Image]) -> list[str | Image.Image]:
    """Neighbouring texts as one, joined by a space; none is added beside pictures, as in training.

    ["a b", "c", picture, "d"] -> ["a b c", picture, "d"]
    """
    joined: list[str | Image.Image] = []
    for part in context:
        if not isinstance(part, str):
            joined.append(part)
        elif joined and isinstance(joined[-1], str):
            joined[-1] = f"{joined[-1]} {part}"
        else:
            joined.append(part)
    return joined


def _drop_beginning(parts: list[Tensor], room: int) -> list[Tensor]:
    """Cut whole pictures and single words off the front until at most `room` positions remain."""
    parts = list(parts)
    excess = sum(map(len, parts)) - room
    while excess > 0:
        first = parts.pop(0)
        if not first.is_floating_point() and len(first) > excess:
            parts.insert(0, first[excess:])
        excess -= len(first)
    return parts


@torch.no_grad()
def gill_conditioning(
    model: MultimodalLanguageModel, hidden: Float[Tensor, "N r e"], batch_size: int = 64
) -> Conditioning:
    """What the trained mapper gives the generator."""
    batches = hidden.split(batch_size)
    embedding = torch.cat([model.generation_embedding(part) for part in batches])
    if model.heads.pooled_projection is None:
        return Conditioning(embedding)
    return Conditioning(embedding, torch.cat([model.generation_pooled(part) for part in batches]))


def text_conditioning(
    conditioner: TextConditioner, prompts: Sequence[str], batch_size: int = 64
) -> Conditioning:
    """What the generator's own text encoder gives it: the paper's baseline."""
    parts = [
        conditioner.encode(prompts[first : first + batch_size])
        for first in range(0, len(prompts), batch_size)
    ]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(
        torch.cat([part.embedding for part in parts]), torch.cat(pooled) if pooled else None
    )


def generate_pictures(
    generator: ImageGenerator,
    prompts: Conditioning,
    empty: Conditioning,
    settings: GenerationSettings,
    seed: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """One picture per conditioning; example i has seed `seed` + i, whichever method made it."""
    total = len(prompts.embedding)
    pictures: list[Image.Image] = []
    for first in range(0, total, settings.batch_size):
        part = slice(first, first + settings.batch_size)
        pooled = None if prompts.pooled is None else prompts.pooled[part]
        batch = Conditioning(prompts.embedding[part], pooled)
        seeds = [seed + first + i for i in range(len(batch.embedding))]
        pictures += generator.generate(batch, empty, seeds=seeds, settings=settings)
        if on_batch is not None:
            on_batch(len(pictures), total)
    return pictures
