"""The tiny autoencoder, a diffusers `AutoencoderKL`: 64 x 64 x 3 to 8 x 8 x 4 and back."""

from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from miniature.drawing import PICTURE_SIZE, render
from miniature.optimization import Optimization, Recipe, Report
from miniature.oracle import score
from miniature.world import SCENES_OF, Scene


class AutoencoderRecipe(Recipe):
    """Sizes and training of the tiny autoencoder."""

    widths: tuple[int, ...] = (16, 32, 32, 32)
    latent_channels: int = 4
    pictures_per_scene: int = 16
    num_steps: int = 3600
    batch: int = 16
    kl_weight: float = 0.01
    gradient_weight: float = 1.0
    matrix_rate: float = 0.01
    other_rate: float = 2e-3


def as_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_pictures(values: Tensor) -> NDArray[np.uint8]:
    """float [N, 3, H, W] in -1..1 to uint8 [N, H, W, 3]."""
    pixels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def _differences(picture: Tensor) -> Tensor:
    """The mean size of the differences between neighbouring pixels."""
    down = (picture[:, :, 1:] - picture[:, :, :-1]).abs().mean()
    across = (picture[..., 1:] - picture[..., :-1]).abs().mean()
    return down + across


def train(
    directory: Path, recipe: AutoencoderRecipe, seed: int, report: Report
) -> dict[str, float]:
    """Trains on pictures of training scenes, writes the autoencoder and returns its scores.

    Its `scaling_factor` gives the latents deviation 1.
    """
    torch.manual_seed(seed)
    levels = len(recipe.widths)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.widths,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        mid_block_add_attention=False,
    )
    pictures = as_tensor(render(SCENES_OF["train"] * recipe.pictures_per_scene, seed))
    optimization = Optimization(
        autoencoder.named_parameters(), recipe.num_steps, recipe.matrix_rate, recipe.other_rate
    )
    for _ in optimization.steps("autoencoder", report):
        batch = pictures[torch.randint(0, len(pictures), (recipe.batch,))]
        posterior = autoencoder.encode(batch).latent_dist
        error = autoencoder.decode(posterior.sample()).sample - batch
        loss = (
            error.abs().mean()
            + error.square().mean()
            + recipe.gradient_weight * _differences(error)
            # Per number of a picture, as the other terms are means over those.
            + recipe.kl_weight * posterior.kl().mean() / batch[0].numel()
        )
        optimization.step(loss)
    autoencoder.eval().requires_grad_(False)
    # The generator's noise has deviation 1: latents have to be of that size.
    deviation = encode(autoencoder, pictures[:1000]).std().item()
    autoencoder.register_to_config(scaling_factor=round(1 / deviation, 4))
    autoencoder.save_pretrained(directory)
    return measure(autoencoder, SCENES_OF["test"] * 4)


def load(directory: Path) -> AutoencoderKL:
    """What `train` wrote."""
    autoencoder = AutoencoderKL.from_pretrained(directory).eval().requires_grad_(False)
    # Otherwise the generator's configuration would name a folder of this machine.
    autoencoder.register_to_config(_name_or_path="")
    return autoencoder


def measure_written(directory: Path) -> dict[str, float]:
    """The scores of what lies in a directory."""
    return measure(load(directory), SCENES_OF["test"] * 4)


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The most likely latents, unscaled: [N, 3, 64, 64] to [N, 4, 8, 8]."""
    return torch.cat([autoencoder.encode(part).latent_dist.mode() for part in pictures.split(200)])


@torch.no_grad()
def measure(
    autoencoder: AutoencoderKL, scenes: tuple[Scene, ...], seed: int = 1
) -> dict[str, float]:
    """What the oracle reads after encoding and decoding, without and with noise on the latents."""
    latents = encode(autoencoder, as_tensor(render(scenes, seed)))
    noise = (
        torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)) * latents.std()
    )
    scores = {}
    for name, level in (("reconstruction", 0.0), ("with_10_percent_noise", 0.1)):
        decoded = [autoencoder.decode(z).sample for z in (latents + level * noise).split(200)]
        scores[name] = round(score(as_pictures(torch.cat(decoded)), scenes)["attributes"], 4)
    return scores
