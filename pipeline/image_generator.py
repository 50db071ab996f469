"""The image side of the frozen generator G_psi: text-conditioning vectors in, pictures out.

The text encoders are not loaded: GILLMapper, or the cache, gives the conditioning. Classifier-free
guidance needs the conditioning of the empty prompt, which the target cache stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from pipeline.backbones import BackboneError
from pipeline.settings import GenerationSettings
from pipeline.text_conditioner import Conditioning

OnStep = Callable[[int, int, list[Image.Image] | None], None]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm-solver": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


class ImageGenerator:
    """A frozen latent-diffusion pipeline without its text side."""

    def __init__(self, pipeline: Any):
        self._pipeline = pipeline
        self._pipeline.set_progress_bar_config(disable=True)
        self._own_scheduler = pipeline.scheduler
        self.width = int(pipeline.unet.config.cross_attention_dim)

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
        Raises BackboneError when D is not the UNet's cross-attention width.
        """
        count, _, width = prompts.embedding.shape
        if width != self.width:
            raise BackboneError(
                f"the conditioning is {width} wide, but the generator's cross-attention takes "
                f"{self.width}: targets and generator come from different models"
            )
        if len(seeds) != count:
            raise ValueError(f"{count} conditionings but {len(seeds)} seeds")
        self._pipeline.scheduler = self._scheduler(settings.scheduler)
        pictures: list[Image.Image] = []
        for start in range(0, count, settings.batch_size):
            part = slice(start, min(start + settings.batch_size, count))
            pictures += self._generate_batch(prompts, empty, part, seeds[part], settings, on_step)
        return pictures

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents, half-made or whole."""
        vae = self._pipeline.vae
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
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
        part: slice,
        seeds: Sequence[int],
        settings: GenerationSettings,
        on_step: OnStep | None,
    ) -> list[Image.Image]:
        unet = self._pipeline.unet
        to = {"device": unet.device, "dtype": unet.dtype}
        size = part.stop - part.start
        inputs = {
            "prompt_embeds": prompts.embedding[part].to(**to),
            "negative_prompt_embeds": empty.embedding.expand(size, -1, -1).to(**to),
        }
        if prompts.pooled is not None and empty.pooled is not None:
            inputs["pooled_prompt_embeds"] = prompts.pooled[part].to(**to)
            inputs["negative_pooled_prompt_embeds"] = empty.pooled.expand(size, -1).to(**to)

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

    Raises BackboneError when a file is missing.
    """
    declared = DiffusionPipeline.load_config(source)
    unused = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2")]
    unused += ["safety_checker", "feature_extractor", "image_encoder"]
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            dtype=dtype,
            **{name: None for name in unused if name in declared},
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"cannot load the image generator {source}: {error}") from error
    return ImageGenerator(pipeline.to(device))
