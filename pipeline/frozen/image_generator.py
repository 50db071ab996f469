"""The image side of the frozen generator G_psi: text-conditioning vectors in, pictures out.

The text encoders are not loaded: GILLMapper, or the cache, gives the conditioning. Classifier-free
guidance needs the conditioning of the empty prompt, which the target cache stores.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from gill_errors import InputError
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.provenance import Provenance, mark_generated
from pipeline.frozen.text_conditioner import load_parts
from pipeline.frozen.watermark import Watermark
from pipeline.settings import GenerationSettings

_log = logging.getLogger(__name__)
OnStep = Callable[[int, int, list[Image.Image] | None], None]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm-solver": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


class ImageGenerator:
    """A frozen latent-diffusion pipeline without its text side.

    A safety checker that the pipeline has is used: what it flags comes out black, with a warning.

    It comes to its device with the first pictures, as their settings say: whole, or in turn with
    main memory (`cpu_offload`).

    Attributes:
        width: D, what the UNet's cross-attention takes.
        pooled_width: what it takes of a pooled text vector besides; None: it takes none.
        picture_size: (width, height) of its pictures, in pixels.
        watermark: what writes an invisible one into every picture; None: nothing does.
    """

    def __init__(
        self,
        pipeline: Any,
        device: str | torch.device = "cpu",
        *,
        name: str = "a diffusers pipeline",
    ):
        self._pipeline = pipeline
        self._name = name
        self.watermark: Watermark | None = None
        if hasattr(pipeline, "watermark"):
            pipeline.watermark = None  # XL's own, there or not as packages are installed
        self._device = torch.device(device)
        self._placed: str | None = None
        self._sliced = False
        self._convolutions = "plain"
        self._pipeline.set_progress_bar_config(disable=True)
        self._own_scheduler = pipeline.scheduler
        unet = pipeline.unet.config
        self.width = int(unet.cross_attention_dim)
        height, width = np.broadcast_to(unet.sample_size, 2) * pipeline.vae_scale_factor
        self.picture_size = int(width), int(height)
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
        if settings.convolutions != self._convolutions:
            self._lay_out(settings.convolutions)
        if self._device.type == "cpu":
            offload = "none"  # everything is in main memory as it is
        else:
            offload = settings.cpu_offload
        if self._placed != offload:
            # Those of an earlier placement would go on moving the parts.
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

    def _lay_out(self, convolutions: str) -> None:
        """In memory as these settings want it, and compiled or not."""
        plain = convolutions == "plain"
        for part in (self._pipeline.unet, self._pipeline.vae):
            part.to(memory_format=torch.contiguous_format if plain else torch.channels_last)
        unet = self._pipeline.unet
        unet._compiled_call_impl = None  # torch has no way back from `compile`
        if convolutions == "compiled" and self._device.type == "cuda":
            unet.compile(dynamic=False)
        self._convolutions = convolutions

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
            # [1, L, D] -> [B, L, D], a view until it is moved.
            "negative_prompt_embeds": empty.embedding.expand(len(prompts), -1, -1).to(**to),
        }
        if prompts.pooled is not None and empty.pooled is not None:
            inputs["pooled_prompt_embeds"] = prompts.pooled.to(**to)
            negative = empty.pooled.expand(len(prompts), -1)
            inputs["negative_pooled_prompt_embeds"] = negative.to(**to)

        def report(_pipe: Any, step: int, _time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                done, every = step + 1, settings.preview_every
                # The last step needs no preview: the picture itself follows.
                due = every > 0 and done % every == 0 and done < settings.steps
                on_step(done, settings.steps, self._decode(kwargs["latents"]) if due else None)
            return kwargs

        made = self._pipeline(
            **inputs,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            # One per picture, on the CPU: its noise is the same on every device and in every batch.
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=report,
        )
        return self._finish(made, seeds, settings)

    def _finish(
        self, made: Any, seeds: Sequence[int], settings: GenerationSettings
    ) -> list[Image.Image]:
        """The pictures watermarked where that is wanted, each with what made it."""
        flags = getattr(made, "nsfw_content_detected", None) or [False] * len(seeds)
        pictures = made.images
        if self.watermark is not None:
            pictures = [self.watermark.write(picture) for picture in pictures]
        for picture, seed, flagged in zip(pictures, seeds, flags, strict=True):
            how = (settings.steps, settings.guidance, settings.scheduler, bool(flagged))
            mark_generated(picture, Provenance(self._name, seed, *how))
        if any(flags):
            _log.warning(
                "%d of %d pictures were withheld by the generator's safety checker and are black "
                "(backbones.safety_checker)",
                sum(map(bool, flags)),
                len(pictures),
            )
        return pictures


def load_image_generator(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    name: str | None = None,
    safety_checker: bool = True,
    watermark: bool = False,
) -> ImageGenerator:
    """Load the UNet, decoder and scheduler of a diffusers pipeline from a directory or hub id.

    `device` is where pictures are made; the first `generate` moves the parts there. `name` is what
    pictures say made them. A safety checker that the pipeline declares is loaded with it, unless
    `safety_checker` is False; `watermark` writes an invisible one (extra `watermark`).

    Raises BackboneError when a file is missing.
    """
    without = ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    if not (safety_checker and declares_safety_checker(source)):
        without += SAFETY_PARTS
    try:
        pipeline = load_parts(source, dtype, without=without)
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"cannot load the image generator {source}: {error}") from error
    if name is None:
        name = "a local pipeline" if Path(source).is_dir() else source
    generator = ImageGenerator(pipeline, device, name=name)
    if watermark:
        generator.watermark = Watermark(generator.picture_size)
    return generator


SAFETY_PARTS = ("safety_checker", "feature_extractor")


def declares_safety_checker(source: str | Path) -> bool:
    """Whether the pipeline in a folder has a safety checker. Raises BackboneError where it is
    declared and its files are not there."""
    index = Path(source) / "model_index.json"
    if not index.is_file():
        return False
    declared = json.loads(index.read_text(encoding="utf-8")).get("safety_checker") or [None]
    if declared[0] is None:
        return False
    absent = [part for part in SAFETY_PARTS if not (Path(source) / part).is_dir()]
    if absent:
        raise BackboneError(
            f"{source}: its {absent[0].replace('_', ' ')} is not there: fetch that folder (with "
            "backbones.allow_download: true, `stages prepare-backbones` does), or leave it out "
            "by backbones.safety_checker: false"
        )
    return True
