"""Stable Diffusion 1.5 from its published sizes with random weights, in bfloat16.

Its text encoder makes the targets of training (captions per second); its UNet and decoder make
pictures of 512 x 512 pixels (pictures per second), plain and with the UNet compiled.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.gpu_measure import (
    Machine,
    Numbers,
    Report,
    made_in,
    transformer_operations,
)
from pipeline.image_generator import ImageGenerator
from pipeline.settings import GenerationSettings
from pipeline.text_conditioner import Conditioning, TextConditioner

LENGTH, WIDTH, VOCABULARY = 77, 768, 49408
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TOY_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
}
TOY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
CAPTION = "a photograph of a small dog that runs along the beach in the evening light"


def targets(machine: Machine, report: Report) -> None:
    """Captions to T_psi(y) of Eq. 3, as the stage encodes them."""
    conditioner = TextConditioner(text_side(machine))
    for size in (4,) if machine.toy else (64, 256, 1024):
        report.measure(f"batch {size}", partial(encoded, machine, conditioner, size))
    size = 4 if machine.toy else 256
    captions = [CAPTION] * size
    report.measure(
        f"kernels, batch {size}",
        lambda: machine.kernels(
            lambda: conditioner.encode(captions),
            machine.seconds(lambda: conditioner.encode(captions)),
        ),
    )


def encoded(machine: Machine, conditioner: TextConditioner, size: int) -> Numbers:
    """With tokenising, and with the result as float16 in the CPU's memory."""
    captions = [CAPTION] * size
    sizes = TOY_TEXT if machine.toy else TEXT
    flop = transformer_operations(sizes["num_hidden_layers"], sizes["hidden_size"], LENGTH)
    on_device = machine.seconds(lambda: conditioner.encode(captions))
    seconds = machine.seconds(lambda: conditioner.encode(captions).embedding.half().cpu().numpy())
    return {
        "captions_per_s": size / seconds,
        "captions_per_s_left_on_device": size / on_device,
        **machine.rate(size * flop, seconds),
    }


def generation(machine: Machine, report: Report) -> None:
    """Pictures as `evaluate` and conversations make them."""
    pipeline = image_side(machine)
    generator = ImageGenerator(pipeline, machine.device)
    sizes = (1, 2) if machine.toy else (1, 8)
    for size in sizes:
        report.measure(f"batch {size}", partial(drawn, machine, generator, size))
    report.measure(f"kernels of batch {size}", partial(profiled, machine, generator, size))
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    report.measure(f"batch {size}, channels last", partial(drawn, machine, generator, size))


def generation_compiled(machine: Machine, report: Report) -> None:
    """The same with the UNet compiled, larger batch first; compiling is timed apart."""
    pipeline = image_side(machine)
    pipeline.unet.compile(dynamic=False, backend=machine.compiler)
    generator = ImageGenerator(pipeline, machine.device)

    def compiled(size: int) -> Numbers:
        start = time.perf_counter()
        draw(machine, generator, size, steps=2)
        compiling = time.perf_counter() - start
        return {**drawn(machine, generator, size), "first_call_s": compiling}

    for size in (1,) if machine.toy else (8, 1):
        report.measure(f"batch {size}", partial(compiled, size))


def drawn(machine: Machine, generator: ImageGenerator, size: int) -> Numbers:
    """50 denoising steps with guidance 7.5, decoded, as pictures in the CPU's memory."""
    steps = 2 if machine.toy else 50
    draw(machine, generator, size, steps=2)
    seconds = machine.seconds(
        lambda: draw(machine, generator, size, steps=steps), warmups=0, times=2
    )
    return {
        "pictures_per_s": size / seconds,
        "s_per_batch": seconds,
        "unet_steps_per_s": steps / seconds,
        "peak_gib": machine.peak_gib(lambda: draw(machine, generator, size, steps=2)),
    }


def draw(machine: Machine, generator: ImageGenerator, size: int, *, steps: int) -> None:
    """Pictures from random conditioning."""
    random = torch.Generator().manual_seed(0)
    width = generator.width
    prompts = Conditioning(torch.randn(size, LENGTH, width, generator=random))
    empty = Conditioning(torch.randn(1, LENGTH, width, generator=random))
    settings = GenerationSettings(steps=steps, batch_size=size)
    generator.generate(prompts, empty, seeds=range(size), settings=settings)


def profiled(machine: Machine, generator: ImageGenerator, size: int) -> Numbers:
    """Where the time of ten denoising steps and one decoding goes."""
    steps = 2 if machine.toy else 10

    def call() -> None:
        draw(machine, generator, size, steps=steps)

    return machine.kernels(call, machine.seconds(call, warmups=1, times=2))


def text_side(machine: Machine) -> Any:
    """Tokenizer and text encoder of a pipeline; the tokenizer spells, and pads to 77 as CLIP's."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
        **(TOY_TEXT if machine.toy else TEXT),
    )
    with made_in(torch.bfloat16, machine.device):
        encoder: Any = CLIPTextModel(config)
    return _pipeline(
        text_encoder=encoder.eval().requires_grad_(False), tokenizer=spelling_tokenizer()
    )


def image_side(machine: Machine) -> Any:
    """UNet, decoder and scheduler of a pipeline."""
    vae: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    if machine.toy:
        vae = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    blocks = len(vae["block_out_channels"])
    with made_in(torch.bfloat16, machine.device):
        unet: Any = UNet2DConditionModel(**(TOY_UNET if machine.toy else UNET))
        decoder: Any = AutoencoderKL(
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            **vae,
        )
    return _pipeline(
        unet=unet.eval().requires_grad_(False), vae=decoder.eval().requires_grad_(False)
    )


def _pipeline(**parts: Any) -> Any:
    names = ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        **{name: parts.get(name) for name in names},
        scheduler=scheduler,
        requires_safety_checker=False,
    )


def spelling_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with letters alone, whose marks have CLIP's own ids."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = {t: i for i, t in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    tokens |= {"<|startoftext|>": VOCABULARY - 2, "<|endoftext|>": VOCABULARY - 1}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps(tokens), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=LENGTH)
