"""Pictures in bulk: what the evaluations of section 4 have in common.

GILL reads interleaved text and pictures, the generator's own text encoder reads words in their
place. Every example has its own seed, so that a result does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.image_generator import ImageGenerator
from pipeline.frozen.text_conditioner import TextConditioner
from pipeline.settings import GenerationSettings


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
