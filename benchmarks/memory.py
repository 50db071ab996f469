"""Predicted peak memory beside what is measured, for training and for making features.

    python -m benchmarks.memory [--quick] [--json FILE]

Predictions are `pipeline.memory`'s, as `stages doctor` prints them: made of configurations alone.
Measured is, on a CPU, the most resident memory of a process of its own less what it held before it
built the model, with random weights of the sizes of OPT-125M, ViT-B/32 and Stable Diffusion 1.5;
with a GPU, besides, `torch.cuda.max_memory_allocated` at OPT-1.3B's size. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from pipeline.multimodal_language_model import MultimodalLanguageModel
from transformers import AutoModelForCausalLM

from pipeline.backbones import Quantization
from pipeline.batch import CaptionBatch
from pipeline.blueprints import (
    find,
    generator_blueprint,
    language_model_blueprint,
    visual_encoder_blueprint,
)
from pipeline.heads import Heads, HeadSizes
from pipeline.language_model import LanguageModel
from pipeline.memory import features_memory, generation_memory, training_memory
from pipeline.objective import PackingDraws
from pipeline.quantization import quantize
from pipeline.settings import GenerationSettings, MapperSizes, Objective, TrainingSettings
from pipeline.stepping import Stepper
from tests.tiny_language_models import tiny_tokenizer

LENGTHS = (5, 8, 9, 10, 11, 12, 14, 19)
ALLOWED = 0.2


@dataclass(frozen=True)
class Case:
    """One measurement: a training step, or the features or generation of `batch_size` pictures."""

    kind: str
    batch_size: int
    dtype: str = "float32"
    packed: bool = False
    quantization: Quantization = "none"
    model: str = "facebook/opt-125m"
    objective: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What is particular about it."""
        parts = [self.kind, str(self.batch_size), self.dtype]
        parts += ["packed"] * self.packed + [self.quantization] * (self.quantization != "none")
        parts += [f"{key}={value}" for key, value in {**self.objective, **self.settings}.items()]
        return " ".join(parts)

    @property
    def training(self) -> TrainingSettings:
        return TrainingSettings(batch_size=self.batch_size, **self.settings)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


CASES = [
    Case("train", 8),
    Case("train", 16, settings={"micro_batch_size": 4}),
    Case("features", 16),
    Case("train", 16),
    Case("train", 16, dtype="bfloat16"),
    Case("train", 32),
    Case("train", 32, packed=True),
    Case("train", 32, objective={"captioning_weight": 0.0}),
    Case("train", 32, settings={"recompute_activations": True}),
    Case("train", 32, settings={"recompute_activations": True, "micro_batch_size": 8}),
    Case("train", 32, packed=True, dtype="bfloat16"),
    Case("train", 32, quantization="int8"),
    Case("features", 64),
    Case("generation", 1),
]
VISUAL_ENCODER = "ViT-B-32-quickgelu:openai"
GENERATOR = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def sizes_of(width: int) -> HeadSizes:
    """The paper's heads around a language model of this width."""
    return HeadSizes(d=1024, e=width, mapper=MapperSizes(adds_embedding=False))


def predict(case: Case, device_type: str) -> int:
    """Bytes, from configurations alone."""
    if case.kind == "features":
        encoder, _ = visual_encoder_blueprint(
            find("visual_encoder", VISUAL_ENCODER), case.torch_dtype
        )
        return features_memory(encoder, case.batch_size, device_type).peak
    if case.kind == "generation":
        generator = generator_blueprint(find("image_generator", GENERATOR), case.torch_dtype)
        return generation_memory(generator, generation(case), device_type).peak
    blueprint = language_model_blueprint(
        find("language_model", case.model), case.torch_dtype, case.quantization
    )
    part = case.training.micro_batch_size or case.batch_size
    return training_memory(
        blueprint,
        sizes_of(blueprint.build(1).width),
        Objective(**case.objective),
        case.training,
        caption_tokens=LENGTHS,
        draws=PackingDraws.same(part, case.packed),
        device_type=device_type,
    ).peak


def prepare(case: Case, device: str) -> Callable[[], object]:
    """Build everything that the case needs; the call is what is measured after it."""
    if case.kind == "features":
        import open_clip

        from pipeline.visual_encoder import VisualEncoder

        name = VISUAL_ENCODER.split(":")[0]
        model: Any = open_clip.create_model(name, load_weights=False, device=device)
        encoder = VisualEncoder(model.to(case.torch_dtype), lambda picture: torch.empty(0), None)
        pixels = torch.zeros(case.batch_size, 3, *encoder.image_size, device=device)
        return lambda: encoder.pooled(pixels)
    if case.kind == "generation":
        return prepare_generation(case, device)
    blueprint = language_model_blueprint(find("language_model", case.model), case.torch_dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(blueprint.config, dtype=case.torch_dtype)
    if case.quantization != "none":
        quantize(model, case.quantization, device)
    language_model = LanguageModel(model.to(device), tiny_tokenizer(), num_rows=50272)
    gill = MultimodalLanguageModel(language_model, Heads(sizes_of(language_model.width)))
    stepper = Stepper(gill, Objective(**case.objective), case.training)
    batch = batch_of(case.batch_size).to(device)
    draws = PackingDraws.same(case.batch_size, case.packed)

    def steps() -> None:
        for number in range(2):  # from the second on the optimiser has its state
            stepper.take(number, batch, draws)

    return steps


def generation(case: Case) -> GenerationSettings:
    """Two denoising steps with guidance."""
    return GenerationSettings(steps=2, batch_size=case.batch_size)


def prepare_generation(case: Case, device: str) -> Callable[[], object]:
    """Stable Diffusion 1.5's UNet and decoder with weights of nothing."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from pipeline.image_generator import ImageGenerator
    from pipeline.text_conditioner import Conditioning

    blueprint = generator_blueprint(find("image_generator", GENERATOR), case.torch_dtype)
    for part in (blueprint.unet, blueprint.vae):
        part.to_empty(device=device)
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data.fill_(1e-3)
    pipeline = StableDiffusionPipeline(
        vae=blueprint.vae,
        unet=blueprint.unet,
        scheduler=DDIMScheduler(clip_sample=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    generator = ImageGenerator(pipeline, device)
    prompts = Conditioning(torch.zeros(case.batch_size, 77, 768))
    empty = Conditioning(torch.zeros(1, 77, 768))
    settings, seeds = generation(case), range(case.batch_size)
    return lambda: generator.generate(prompts, empty, seeds=seeds, settings=settings)


def batch_of(num_examples: int) -> CaptionBatch:
    """Random captions of 11 tokens on average, with random features and targets."""
    generator = torch.Generator().manual_seed(0)
    captions = [
        torch.randint(5, 50000, (LENGTHS[i % len(LENGTHS)],), generator=generator).tolist()
        for i in range(num_examples)
    ]
    return CaptionBatch.from_lists(
        captions,
        torch.randn(num_examples, 1024, generator=generator),
        torch.randn(num_examples, 77, 768, generator=generator),
        torch.arange(num_examples),
        max_tokens=23,
    )


def measure_here(case: Case) -> int:
    """Bytes of resident memory that this process takes for a case; call it in a fresh one."""
    torch.set_num_threads(1)
    warm = torch.nn.Linear(64, 64)  # the libraries' own buffers
    warm(torch.zeros(4, 64)).sum().backward()
    before = _status("VmRSS")
    work = prepare(case, "cpu")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    work()
    return _status("VmHWM") - before


def measure(case: Case) -> int:
    """As `measure_here`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", str(CASES.index(case))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # freed means given back
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def measure_on_gpu(case: Case) -> int:
    """Bytes that torch holds on the GPU at most."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    prepare(case, "cuda")()
    return torch.cuda.max_memory_allocated()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    """Predict, measure, print both, and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three cases, within 50 s")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(measure_here(CASES[arguments.measure]))
        return
    ratios: dict[str, float] = {}
    print(f"{'':58}{'predicted':>10}{'measured':>10}{'ratio':>7}   MB")

    def show(name: str, predicted: int, measured: int) -> None:
        ratios[name] = predicted / measured
        print(
            f"{name:58}{predicted / 1e6:10.0f}{measured / 1e6:10.0f}{ratios[name]:7.2f}", flush=True
        )

    for case in CASES[:3] if arguments.quick else CASES:
        show(case.name, predict(case, "cpu"), measure(case))
    if torch.cuda.is_available():
        kinds: tuple[Quantization, ...] = ("none", "int8", "nf4")
        for quantization in kinds:
            case = Case(
                "train", 200, "bfloat16", quantization=quantization, model="facebook/opt-1.3b"
            )
            show(f"gpu {case.name}", predict(case, "cuda"), measure_on_gpu(case))
    worst = max(abs(ratio - 1) for ratio in ratios.values())
    print(f"largest deviation {worst:.0%}; allowed {ALLOWED:.0%}")
    line = json.dumps({"worst": worst, **ratios})
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
