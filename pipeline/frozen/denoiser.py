"""The frozen generator's own training loss: its UNet told to find the noise in noisy latents.

    latents, noise, timestep ─ the scheduler's noise schedule ─ noisy latents ┐
    text conditioning (of GILLMapper, with gradient) ─────────────────────────┴ UNet ─ error

Nothing here is trained: the UNet stays in evaluation mode, and its weights take no gradient. What
is to be predicted (noise, velocity or the latents) is what the pipeline's scheduler says.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from torch import Tensor

from gill_errors import InputError
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.latent_encoder import latent_shape
from pipeline.frozen.text_conditioner import load_parts

_PREDICTS = ("epsilon", "v_prediction", "sample")
_NOT_OF_THE_UNET = (
    *("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    *("vae", "safety_checker", "feature_extractor"),
)


class Denoiser:
    """A frozen UNet with the noise schedule that it was trained on.

    Attributes:
        num_timesteps: noise levels that a timestep may name, from 0.
        empty: the conditioning of the empty prompt, B = 1, for examples whose own is dropped.

    Raises:
        BackboneError: the scheduler predicts something else than noise, velocity or latents.
        InputError: the UNet is in float16, in which gradients underflow.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        *,
        scaling: float,
        picture_size: tuple[int, int],
        empty: Conditioning | None = None,
    ) -> None:
        """`scaling` multiplies the autoencoder's latents; `picture_size` is (width, height)."""
        # The pipeline's own sampler has the schedule, but not every one has the velocity.
        self._schedule = DDPMScheduler.from_config(scheduler.config)
        self._predicts = self._schedule.config.prediction_type
        if self._predicts not in _PREDICTS:
            raise BackboneError(
                f"the image generator's scheduler predicts {self._predicts}: its denoising loss "
                f"is known for {', '.join(_PREDICTS)} alone"
            )
        if unet.dtype == torch.float16:
            raise InputError(
                "the image generator is in float16, in which gradients underflow: train with "
                "bfloat16 or float32 (backbones.image_generator_dtype)"
            )
        self._unet = unet.eval().requires_grad_(False)
        self._scaling, self.empty = scaling, empty
        self.num_timesteps = int(self._schedule.config.num_train_timesteps)
        width, height = picture_size
        # Original size, crop, target size: a whole picture of the size that it is made in.
        self._sizes = (height, width, 0, 0, height, width)

    def recompute_activations(self) -> None:
        """From now on keep the inputs of the UNet's blocks alone until the backward pass."""
        self._unet.enable_gradient_checkpointing()  # looks at gradients, not at `training`

    def loss(
        self,
        latents: Float[Tensor, "B C H W"],
        noise: Float[Tensor, "B C H W"],
        timesteps: Int64[Tensor, " B"],
        conditioning: Conditioning,
    ) -> Float[Tensor, ""]:
        """Mean squared error of the UNet's prediction, in float32.

        `latents` are the autoencoder's, not yet scaled. The gradient reaches `conditioning` alone.
        """
        unet, schedule = self._unet, self._schedule
        clean = latents * self._scaling
        noisy = schedule.add_noise(clean, noise, timesteps)
        inputs: dict[str, Any] = {}
        if unet.config.addition_embed_type == "text_time":
            if conditioning.pooled is None:
                raise InputError("this UNet reads a pooled text vector, and there is none")
            sizes = torch.tensor(self._sizes, device=unet.device, dtype=unet.dtype)
            inputs["added_cond_kwargs"] = {
                "text_embeds": conditioning.pooled.to(unet.dtype),
                "time_ids": sizes.expand(len(latents), -1),
            }
        predicted = unet(
            noisy.to(unet.dtype), timesteps, conditioning.embedding.to(unet.dtype), **inputs
        ).sample
        if self._predicts == "epsilon":
            target = noise
        elif self._predicts == "v_prediction":
            target = schedule.get_velocity(clean, noise, timesteps)
        else:
            target = clean
        return torch.nn.functional.mse_loss(predicted.float(), target.float())


def load_denoiser(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    empty: Conditioning | None = None,
) -> Denoiser:
    """The UNet and noise schedule of a diffusers pipeline in a directory.

    Raises BackboneError when a file is missing, and as `Denoiser`.
    """
    try:
        pipeline = load_parts(source, dtype, without=_NOT_OF_THE_UNET)
        autoencoder = AutoencoderKL.load_config(source, subfolder="vae")
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"cannot load the UNet of {source}: {error}") from error
    unet = pipeline.unet.to(device)
    factor = 2 ** (len(autoencoder["block_out_channels"]) - 1)
    _, _, height, width = latent_shape(source)
    if empty is not None:
        to = {"device": unet.device, "dtype": torch.float32}
        pooled = None if empty.pooled is None else empty.pooled.to(**to)
        empty = Conditioning(empty.embedding.to(**to), pooled)
    return Denoiser(
        unet,
        pipeline.scheduler,
        scaling=float(autoencoder.get("scaling_factor", 0.18215)),
        picture_size=(width * factor, height * factor),
        empty=empty,
    )
