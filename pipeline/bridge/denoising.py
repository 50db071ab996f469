"""The denoising loss of GILLMapper's output: what the frozen generator makes of it, not how far it
lies from the text encoder's.

All that is random in it is drawn for each example from a seed of its own, on the CPU: the same with
any number of processes and micro-batches, and on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.devices import sent
from pipeline.frozen.conditioning import Conditioning
from pipeline.settings import Objective


def draw_seeds(num_examples: int, generator: torch.Generator) -> list[int]:
    """One for each example of a step."""
    return torch.randint(2**62, (num_examples,), generator=generator).tolist()


def denoising_loss(
    gill: MultimodalLanguageModel,
    batch: CaptionBatch,
    conditioning: Conditioning,
    seeds: Sequence[int],
    objective: Objective,
) -> Float[Tensor, ""]:
    """Mean over the examples; the gradient reaches `conditioning` alone.

    Raises InputError where the model has no denoiser, or the batch no latents.
    """
    denoiser, posterior = gill.denoiser, batch.posterior
    if denoiser is None or posterior is None:
        raise InputError(
            "objective.diffusion_weight asks for the generator's UNet and the pictures' latents: "
            f"there is no {'UNet' if denoiser is None else 'latents in the batch'}"
        )
    mean, deviation = posterior.unbind(1)
    timesteps, dropped, samples, noise = _draws(
        seeds, mean.shape[1:], denoiser.num_timesteps, objective.condition_dropout
    )
    device = posterior.device
    if objective.condition_dropout:
        if denoiser.empty is None:
            raise InputError("objective.condition_dropout needs the empty prompt's conditioning")
        conditioning = _where(sent(dropped, device), denoiser.empty, conditioning)
    latents = mean + deviation * sent(samples, device)
    return denoiser.loss(latents, sent(noise, device), sent(timesteps, device), conditioning)


def _draws(
    seeds: Sequence[int], shape: Sequence[int], num_timesteps: int, dropout: float
) -> tuple[
    Int64[Tensor, " B"], Bool[Tensor, " B"], Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]
]:
    """Timesteps, whose condition is dropped, and two normal draws: of the posterior, of the noise.

    In this order whatever the objective, so that the rest is the same with and without dropping.
    """
    generator, draws = torch.Generator(), []
    for seed in seeds:
        generator.manual_seed(seed)
        draws.append(
            (
                torch.randint(num_timesteps, (), generator=generator),
                torch.rand((), generator=generator) < dropout,
                torch.randn(tuple(shape), generator=generator),
                torch.randn(tuple(shape), generator=generator),
            )
        )
    timesteps, dropped, samples, noise = (torch.stack(column) for column in zip(*draws))
    return timesteps, dropped, samples, noise


def _where(
    dropped: Bool[Tensor, " B"], empty: Conditioning, conditioning: Conditioning
) -> Conditioning:
    """`empty` for those that are dropped, their own for the others."""
    embedding = torch.where(dropped[:, None, None], empty.embedding, conditioning.embedding)
    if conditioning.pooled is None or empty.pooled is None:
        return Conditioning(embedding, conditioning.pooled)
    return Conditioning(embedding, torch.where(dropped[:, None], empty.pooled, conditioning.pooled))
