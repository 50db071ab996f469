"""The frozen autoencoder's first half: pictures in, mean and deviation of their latents out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor

from pipeline.devices import sent
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.text_conditioner import load_parts


class LatentEncoder:
    """The encoder of a latent-diffusion pipeline, in float32: some overflow in float16."""

    def __init__(self, autoencoder: Any, latent_size: tuple[int, int]) -> None:
        """`latent_size` is (height, width) of the latents of the pictures that the UNet makes."""
        self._autoencoder = autoencoder.eval().requires_grad_(False)
        factor = 2 ** (len(autoencoder.config["block_out_channels"]) - 1)
        height, width = latent_size
        self._picture_size = width * factor, height * factor

    def preprocess(self, picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
        """The middle of a picture, at the generator's own size, as training scripts cut it."""
        return np.asarray(ImageOps.fit(picture, self._picture_size, Image.Resampling.LANCZOS))

    @torch.no_grad()
    def encode(
        self, pixels: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> Float[Tensor, "B 2 C H W"]:
        """Mean and deviation of the latents, as the autoencoder gives them: not yet scaled."""
        stacked = sent(torch.from_numpy(np.stack(pixels)), self._autoencoder.device)
        values = stacked.permute(0, 3, 1, 2).float() / 127.5 - 1  # -1..1
        posterior = self._autoencoder.encode(values).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)


def load_latent_encoder(source: str, *, device: str | torch.device = "cpu") -> LatentEncoder:
    """The autoencoder of a diffusers pipeline in a directory.

    Raises BackboneError when a file is missing.
    """
    _, _, height, width = latent_shape(source)
    try:
        pipeline = load_parts(source, torch.float32, without=_NOT_OF_THE_AUTOENCODER)
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"cannot load the autoencoder of {source}: {error}") from error
    return LatentEncoder(pipeline.vae.to(device), (height, width))


def latent_shape(source: str) -> tuple[int, int, int, int]:
    """(2, C, H, W) of what is made of a picture, mean and deviation: from configurations alone.

    Raises BackboneError when one is missing.
    """
    try:
        autoencoder = AutoencoderKL.load_config(source, subfolder="vae")
        unet = UNet2DConditionModel.load_config(source, subfolder="unet")
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read the configuration of {source}: {error}") from error
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return 2, int(autoencoder["latent_channels"]), int(height), int(width)


_NOT_OF_THE_AUTOENCODER = (
    *("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    *("unet", "safety_checker", "feature_extractor"),
)
