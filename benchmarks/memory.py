"""Predicted peak memory beside what is measured, for training, features and generation.

    python -m benchmarks.memory [--device cuda] [--quick] [--json FILE]

Predictions are `doctor.memory`'s, as `stages doctor` prints them: made of configurations alone.
Every case is measured in a process of its own, with random weights. On a CPU: the most resident
memory less what was held before the model was built, at the sizes of OPT-125M, ViT-B/32 and Stable
Diffusion 1.5. On a GPU: the most bytes in tensors, for OPT-1.3B and the published batch. `worst` is
the largest deviation; a fifth is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import Bench, Numbers, Unavailable, in_new_process, peak, reset_peak, run
from benchmarks.random_models import (
    LENGTHS,
    STABLE_DIFFUSION,
    batch_of,
    head_sizes,
    opt_config,
    opt_gill,
    stable_diffusion,
)
from doctor.blueprints import (
    LanguageModelBlueprint,
    find,
    generator_blueprint,
    visual_encoder_blueprint,
)
from doctor.memory import features_memory, generation_memory, training_memory
from miniature.backbones import SHIPPED
from pipeline.bridge.objective import PackingDraws
from pipeline.frozen.backbones import Quantization
from pipeline.frozen.image_generator import ImageGenerator
from pipeline.frozen.text_conditioner import Conditioning
from pipeline.frozen.visual_encoder import load_visual_encoder
from pipeline.settings import GenerationSettings, Objective, TrainingSettings
from pipeline.training.stepping import Stepper

Call = Callable[[], object]
Compared = tuple[int, Callable[[], Call]]
"""The predicted bytes, and what builds all that the measured call needs."""


def training(
    batch_size: int,
    device: str,
    size: str = "125m",
    dtype: str = "float32",
    packed: bool = False,
    quantization: Quantization = "none",
    captioning_weight: float = 1.0,
    **settings: Any,
) -> Compared:
    """Two steps: from the second on the optimiser has its state."""
    number_type = getattr(torch, dtype)
    how = TrainingSettings(batch_size=batch_size, **settings)
    objective = Objective(captioning_weight=captioning_weight)
    predicted = training_memory(
        LanguageModelBlueprint(opt_config(size), number_type, quantization),
        head_sizes(size),
        objective,
        how,
        caption_tokens=LENGTHS,
        draws=PackingDraws.same(how.micro_batch_size or batch_size, packed),
        device_type=device,
    )

    def build() -> Call:
        gill = opt_gill(size, device, number_type, quantization)
        stepper, batch = Stepper(gill, objective, how), batch_of(gill, batch_size)
        draws = PackingDraws.same(batch_size, packed)

        def steps() -> None:
            for number in range(2):
                stepper.take(number, batch, draws)

        return steps

    return predicted.peak, build


def features(batch_size: int, device: str, toy: bool = False) -> Compared:
    """One batch of pictures."""
    source = str(SHIPPED.visual_encoder) if toy else "ViT-B-32-quickgelu:openai"
    blueprint, _ = visual_encoder_blueprint(find("visual_encoder", source), torch.float32)

    def build() -> Call:
        name = f"local-dir:{source}" if toy else source.split(":")[0]
        encoder = load_visual_encoder(name, device=device)
        return partial(encoder.pooled, torch.zeros(batch_size, 3, *encoder.image_size))

    return features_memory(blueprint, batch_size, device).peak, build


def generation(batch_size: int, device: str, toy: bool = False) -> Compared:
    """Two denoising steps with guidance, and decoding."""
    source = str(SHIPPED.image_generator) if toy else STABLE_DIFFUSION
    blueprint = generator_blueprint(find("image_generator", source), torch.float32)
    settings = GenerationSettings(steps=2, batch_size=batch_size)

    def build() -> Call:
        parts = stable_diffusion("unet", "vae", toy=toy, dtype=torch.float32, device=device)
        generator = ImageGenerator(parts, device)
        sizes = (batch_size, 1)
        prompts, empty = (Conditioning(torch.zeros(n, 77, generator.width)) for n in sizes)
        return partial(
            generator.generate, prompts, empty, seeds=range(batch_size), settings=settings
        )

    return generation_memory(blueprint, settings, device).peak, build


WORKS: dict[str, Callable[..., Compared]] = {
    "training": training,
    "features": features,
    "generation": generation,
}


def measure(bench: Bench) -> None:
    all_cases = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    cases = all_cases[bench.size("toy", "quick" if bench.quick else "cpu", "gpu")]

    def compare(name: str) -> Numbers:
        if "nf4" in name and find_spec("bitsandbytes") is None:
            raise Unavailable("bitsandbytes is not installed")
        predicted, measured = in_new_process(compare_here, cases[name], bench.device)
        megabytes = {"predicted_mb": predicted / 1e6, "measured_mb": measured / 1e6}
        return {**megabytes, "ratio": predicted / measured}

    for name in cases:
        bench.part(name, partial(compare, name))
    ratios = [bench.results[name].get("ratio", 1.0) for name in cases]
    bench.part("worst", lambda: {"deviation": max(abs(ratio - 1) for ratio in ratios)})


def compare_here(case: dict[str, Any], device: str) -> tuple[int, int]:
    """Bytes that a case is predicted to take and takes, in a process that is fresh."""
    torch.set_num_threads(1)
    warm = torch.nn.Linear(64, 64, device=device)  # the libraries' own buffers
    warm(torch.zeros(4, 64, device=device)).sum().backward()
    arguments = dict(case)
    predicted, build = WORKS[arguments.pop("work")](device=device, **arguments)
    held = reset_peak(device)
    work = build()
    reset_peak(device)
    work()
    return predicted, peak(device) - held


if __name__ == "__main__":
    run(measure, __doc__)
