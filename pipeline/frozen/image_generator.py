"""The image side of the frozen generator G_psi: text-conditioning vectors in, pictures out.

The text encoders are not loaded: GILLMapper, or the cache, gives the conditioning. Classifier-free
guidance needs the conditioning of the empty prompt, which the target cache stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from gill_errors import InputError
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.text_conditioner import load_parts
from pipeline.settings import GenerationSettings

OnStep = Callable[[int, int, list[Image.Image] | None], None]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm-solver": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


class ImageGenerator:
    """A frozen latent-diffusion pipeline without its text side.

    It comes to its device with the first pictures, as their settings say: whole, or in turn with
    main memory (`cpu_offload`).

    Attributes:
        width: D, what the UNet's cross-attention takes.
        pooled_width: what it takes of a pooled text vector besides; None: it takes none.
    """

    def __init__(self, pipeline: Any, device: str | torch.device = "cpu"):
        self._pipeline = pipeline
        self._device = torch.device(device)
        self._placed: str | None = None
        self._sliced = False
        self._pipeline.set_progress_bar_config(disable=True)
        self._own_scheduler = pipeline.scheduler
        unet = pipeline.unet.config
        self.width = int(unet.cross_attention_dim)
        self.pooled_width: int | None = None
        if unet.addition_embed_type == "text_time":
            # Besides the pooled vector: six numbers of size and crop, each embedded.
            times = 6 * unet.addition_time_embed_dim
            self.pooled_width = int(unet.projection_class_embeddings_input_dim) - times

    @torch.no_grad()
    def generate(
        self,
        prompts: Conditioning,
        empty: Conditioning,
        *,
        seeds: Sequence[int],
        settings: GenerationSettings,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Pictures for B conditionings; picture i depends on seeds[i] alone, not on its batch.

        `prompts.embedding` is [B, L, D], `empty` that of the empty prompt with batch 1.
        `on_step(done, total, previews)` is called after every denoising step of every batch;
        `previews` are its half-made pictures every `settings.preview_every` steps, else None.
        Raises BackboneError when D or the pooled width is not what the UNet takes.
        """
        count = len(prompts)
        self._refuse_unfit(prompts)
        self._refuse_unfit(empty)
        if len(seeds) != count:
            raise InputError(f"{count} conditionings but {len(seeds)} seeds")
        self._pipeline.scheduler = self._scheduler(settings.scheduler)
        self._place(settings)
        pictures: list[Image.Image] = []
        for start in range(0, count, settings.batch_size):
            part = slice(start, min(start + settings.batch_size, count))
            pictures += self._generate_batch(
                prompts.part(part), empty, seeds[part], settings, on_step
            )
        return pictures

    def _refuse_unfit(self, prompts: Conditioning) -> None:
        """By name, before any denoising."""
        width = prompts.embedding.shape[2]
        if width != self.width:
            raise BackboneError(
                f"D, the text width, is {width} in the conditioning, but the generator's "
                f"cross-attention takes {self.width}: targets or heads and generator come from "
                "different models"
            )
        pooled = None if prompts.pooled is None else prompts.pooled.shape[1]
        if pooled != self.pooled_width:
            raise BackboneError(
                f"D_pooled, the width of the pooled text vector, is {pooled or 'absent'} in the "
                f"conditioning, but the generator takes {self.pooled_width or 'none'}: targets or "
                "heads and generator come from different models"
            )

    def _place(self, settings: GenerationSettings) -> None:
        """Bring the parts where these settings want them, and slice what they want sliced."""
        pipe, vae = self._pipeline, self._pipeline.vae
        if self._device.type == "cpu":
            offload = "none"  # everything is in main memory as it is
        else:
            offload = settings.cpu_offload
        if self._placed != offload:
            pipe.remove_all_hooks()
            if offload == "none":
                pipe.to(self._device)
            elif offload == "model":
                pipe.enable_model_cpu_offload(device=self._device)
            else:
                pipe.enable_sequential_cpu_offload(device=self._device)
            self._placed = offload
        if settings.attention_slicing != self._sliced:
            pipe.enable_attention_slicing("auto" if settings.attention_slicing else None)
            self._sliced = settings.attention_slicing
        (vae.enable_slicing if settings.vae_slicing else vae.disable_slicing)()
        (vae.enable_tiling if settings.vae_tiling else vae.disable_tiling)()

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Half-made pictures of latents."""
        vae = self._pipeline.vae
        # XL's decoder overflows in float16; its pipeline takes float32 there too.
        wide = vae.dtype == torch.float16 and vae.config.force_upcast
        dtype = vae.dtype
        if wide:
            vae.to(torch.float32)
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        if wide:
            vae.to(dtype)
        return self._pipeline.image_processor.postprocess(pixels, output_type="pil")

    def _scheduler(self, name: str) -> Any:
        """The pipeline's own scheduler, or another with its noise schedule."""
        if name == "pipeline":
            return self._own_scheduler
        # DDIM clips the predicted sample to [-1, 1] by default: right for pixels, not for latents.
        latents = {"clip_sample": False} if name == "ddim" else {}
        return SCHEDULERS[name].from_config(self._own_scheduler.config, **latents)

    def _generate_batch(
        self,
        prompts: Conditioning,
        empty: Conditioning,
        seeds: Sequence[int],
        settings: GenerationSettings,
        on_step: OnStep | None,
    ) -> list[Image.Image]:
        to = {"device": self._device, "dtype": self._pipeline.unet.dtype}
        inputs = {
            "prompt_embeds": prompts.embedding.to(**to),
            "negative_prompt_embeds": empty.embedding.expand(len(prompts), -1, -1).to(**to),
        }
        if prompts.pooled is not None and empty.pooled is not None:
            inputs["pooled_prompt_embeds"] = prompts.pooled.to(**to)
            negative = empty.pooled.expand(len(prompts), -1)
            inputs["negative_pooled_prompt_embeds"] = negative.to(**to)

        def report(_pipe: Any, step: int, _time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                done, every = step + 1, settings.preview_every
                due = every > 0 and done % every == 0 and done < settings.steps
                on_step(done, settings.steps, self._decode(kwargs["latents"]) if due else None)
            return kwargs

        return self._pipeline(
            **inputs,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=report,
        ).images


def load_image_generator(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> ImageGenerator:
    """Load the UNet, decoder and scheduler of a diffusers pipeline from a directory or hub id.

    `device` is where pictures are made; the first `generate` moves the parts there.

    Raises BackboneError when a file is missing.
    """
    text_side = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    try:
        pipeline = load_parts(source, dtype, without=text_side)
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"cannot load the image generator {source}: {error}") from error
    return ImageGenerator(pipeline, device)
