"""What the denoising loss adds to a step, and what its latents cost. For `stages doctor`.

A dry run of few examples stands for all: bytes and operations of a UNet are proportional to them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from doctor.blueprints import GeneratorBlueprint
from doctor.dry_run import DryRun
from doctor.memory import Memory, weight_bytes
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.denoiser import Denoiser
from pipeline.settings import Objective

_EXAMPLES = 2


def without_denoising(objective: Objective) -> Objective:
    """The same with a regression in the place of the denoising loss: what the heads do for it."""
    weight = objective.generation_weight or objective.diffusion_weight
    return objective.model_copy(update={"diffusion_weight": 0.0, "generation_weight": weight})


def denoising_memory(
    generator: GeneratorBlueprint,
    device_type: str = "cuda",
    *,
    recompute: bool = False,
    gradient: bool = True,
) -> Memory:
    """The frozen UNet's weights, and per example the rest: its latents, and its forward and
    backward pass, or without `gradient` the first alone."""
    unet, size = generator.unet, generator.picture_size
    unet.disable_gradient_checkpointing()  # as an earlier prediction may have left it
    denoiser = Denoiser(unet, DDPMScheduler(), scaling=1.0, picture_size=(size, size))
    if recompute:
        denoiser.recompute_activations()

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(_EXAMPLES, *shape, device="meta")

    latents = zeros(int(unet.config.in_channels), generator.latent_size, generator.latent_size)
    embedding = zeros(generator.length, generator.cross_attention_width).requires_grad_(gradient)
    pooled = None if generator.pooled_width is None else zeros(generator.pooled_width)
    timesteps = zeros().long()
    run = DryRun(device_type)

    def step() -> None:
        conditioning = Conditioning(embedding, pooled)
        loss = denoiser.loss(latents, latents, timesteps, conditioning)
        if gradient:
            loss.backward()

    run(step)
    # The posterior's mean and deviation lie there; its sample and the noise are made for the step.
    return Memory(
        weights=weight_bytes(unet),
        data=2 * latents.nbytes // _EXAMPLES,
        working=(run.ledger.peak + 2 * latents.nbytes) // _EXAMPLES,
        flop=run.ledger.flop / _EXAMPLES,
    )


def with_denoising(memory: Memory, added: Memory, rows: int, held: int) -> Memory:
    """A step that reads `rows` examples at once and holds `held`, with the denoising loss: at its
    fullest where both are, as the language model's activations wait for the UNet's gradient."""
    return replace(
        memory,
        weights=memory.weights + added.weights,
        data=memory.data + held * added.data,
        working=memory.working + rows * added.working,
        flop=memory.flop + added.flop,
    )


@torch.no_grad()
def latents_memory(
    generator: GeneratorBlueprint, batch_size: int, device_type: str = "cuda"
) -> Memory:
    """Peak memory of the autoencoder's first half, in float32, over `batch_size` pictures."""
    vae, size = generator.vae, generator.picture_size
    own: Any = vae.dtype
    vae.to(torch.float32)
    pixels = torch.zeros(batch_size, 3, size, size, device="meta")
    run = DryRun(device_type)
    run(lambda: vae.encode(pixels))
    weights = weight_bytes(vae)
    vae.to(own)
    flop = run.ledger.flop / batch_size
    return Memory(weights=weights, data=pixels.nbytes, working=run.ledger.peak, flop=flop)
