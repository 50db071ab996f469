"""What a picture costs: 50 denoising steps of Stable Diffusion 1.5 with guidance, and decoding.

    python -m benchmarks.generation [--device cuda] [--quick] [--json FILE]

Random weights in bfloat16, pictures of 512 x 512 pixels: alone and in a batch, where the time goes,
in the memory format that convolutions prefer, and with the UNet compiled (`first_s`, two steps, is
then what compiling takes). On a CPU the miniature generator.
"""

from __future__ import annotations

from functools import partial

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
    large, steps = (2, 2) if toy else (8, 10)
    for size in (1, large):
        bench.part(f"{size} at once", partial(drawn, bench, generator, size))
    bench.part("kernels", lambda: bench.kernels(partial(draw, generator, large, steps)))
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    bench.part(f"{large} at once, channels last", partial(drawn, bench, generator, large))
    if not bench.quick:
        # Without a GPU the UNet is traced and then run as it is.
        pipeline.unet.compile(dynamic=False, backend="inductor" if bench.on_gpu else "eager")
        for size in (large, 1) if bench.on_gpu else (1,):
            bench.part(f"{size} at once, compiled", partial(drawn, bench, generator, size))


def drawn(bench: Bench, generator: ImageGenerator, size: int) -> Numbers:
    """Pictures as they arrive in the CPU's memory."""
    steps = 50 if bench.on_gpu and not bench.toy else 2
    first = bench.once(lambda: draw(generator, size, 2))
    seconds = bench.once(lambda: draw(generator, size, steps))
    return {
        "pictures/s": size / seconds,
        "batch_s": seconds,
        "steps/s": steps / seconds,
        "first_s": first,
        "peak_gib": bench.memory(lambda: draw(generator, size, 2))[1] / 2**30,
    }


def draw(generator: ImageGenerator, size: int, steps: int) -> None:
    """`size` pictures from random conditioning."""
    prompts, empty = (Conditioning(torch.randn(n, 77, generator.width)) for n in (size, 1))
    settings = GenerationSettings(steps=steps, batch_size=size, scheduler="ddim")
    generator.generate(prompts, empty, seeds=range(size), settings=settings)


if __name__ == "__main__":
    run(measure, __doc__)
