"""What a picture costs: 50 denoising steps of Stable Diffusion 1.5 with guidance, and decoding.

    python -m benchmarks.generation [--device cuda] [--quick] [--json FILE]

Random weights in bfloat16, pictures of 512 x 512 pixels: alone and in batches of 8 and 16, with
each choice of `run.convolutions` (`first_s`, two steps, is also what compiling takes), and where
the time goes. On a CPU the miniature generator, which is not compiled.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.harness import Bench, Numbers, run
from benchmarks.random_models import stable_diffusion
from pipeline.frozen.image_generator import ImageGenerator
from pipeline.frozen.text_conditioner import Conditioning
from pipeline.settings import GenerationSettings


def measure(bench: Bench) -> None:
    toy = bench.toy or not bench.on_gpu
    pipeline = stable_diffusion("unet", "vae", toy=toy, dtype=bench.dtype, device=bench.device)
    generator = ImageGenerator(pipeline, bench.device)
    sizes, steps = ((1, 2), 2) if toy else ((1, 8, 16), 10)
    for convolutions in ("plain", "channels_last", *(() if bench.quick else ("compiled",))):
        for size in sizes:
            said = "" if convolutions == "plain" else f", {convolutions.replace('_', ' ')}"
            work = partial(drawn, bench, generator, size, convolutions)
            bench.part(f"{size} at once{said}", work)
        if convolutions == "plain":
            bench.part("kernels", lambda: bench.kernels(partial(draw, generator, sizes[1], steps)))


def drawn(bench: Bench, generator: ImageGenerator, size: int, convolutions: Any) -> Numbers:
    """Pictures as they arrive in the CPU's memory."""
    steps = 50 if bench.on_gpu and not bench.toy else 2
    first = bench.once(lambda: draw(generator, size, 2, convolutions))
    seconds = bench.once(lambda: draw(generator, size, steps, convolutions))
    return {
        "pictures/s": size / seconds,
        "batch_s": seconds,
        "steps/s": steps / seconds,
        "first_s": first,
        "peak_gib": bench.memory(lambda: draw(generator, size, 2, convolutions))[1] / 2**30,
    }


def draw(generator: ImageGenerator, size: int, steps: int, convolutions: Any = "plain") -> None:
    """`size` pictures from random conditioning."""
    prompts, empty = (Conditioning(torch.randn(n, 77, generator.width)) for n in (size, 1))
    settings = GenerationSettings(
        steps=steps, batch_size=size, scheduler="ddim", convolutions=convolutions
    )
    generator.generate(prompts, empty, seeds=range(size), settings=settings)


if __name__ == "__main__":
    run(measure, __doc__)
