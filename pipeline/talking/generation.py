"""Pictures in bulk: what the evaluations of section 4 have in common.

GILL reads interleaved text and pictures, the generator's own text encoder reads words in their
place. Every example has its own seed, so that a result does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.image_generator import ImageGenerator
from pipeline.frozen.text_conditioner import TextConditioner
from pipeline.settings import GenerationSettings


def text_conditioning(
    conditioner: TextConditioner, prompts: Sequence[str], batch_size: int = 64
) -> Conditioning:
    """What the generator's own text encoder gives it: the paper's baseline."""
    starts = range(0, len(prompts), batch_size)
    return Conditioning.join([conditioner.encode(prompts[i : i + batch_size]) for i in starts])


def generate_pictures(
    generator: ImageGenerator,
    prompts: Conditioning,
    empty: Conditioning,
    settings: GenerationSettings,
    seed: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """One picture per conditioning; example i has seed `seed` + i, whichever method made it."""
    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), settings.batch_size):
        batch = prompts.part(slice(first, first + settings.batch_size))
        seeds = range(seed + first, seed + first + len(batch))
        pictures += generator.generate(batch, empty, seeds=seeds, settings=settings)
        if on_batch is not None:
            on_batch(len(pictures), len(prompts))
    return pictures
