"""The text side of the frozen image generator: T_psi(y), the targets of GILLMapper (Eq. 3).

Only the tokenizers and text encoders of a diffusers pipeline are loaded, and its own
`encode_prompt` does the work, so Stable Diffusion 1.x, 2.x and XL come out as they themselves
condition: L positions of width D, padding included, and for XL a pooled vector besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.plain_text import read_control_tokens_as_text
from pipeline.frozen.weight_files import variant_of


class TextConditioner:
    """Frozen tokenizers and text encoders of one generator."""

    def __init__(self, pipeline: Any):
        self._pipeline = pipeline
        probe = self.encode([""])
        self.length, self.width = probe.embedding.shape[1:]
        self.pooled_width = None if probe.pooled is None else probe.pooled.shape[1]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of the prompts; what passes the encoder's length is cut on the right."""
        result = self._pipeline.encode_prompt(
            prompt=list(prompts),
            device=self._pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        # XL gives embedding, negative, pooled, negative pooled; the others the first two.
        return Conditioning(result[0], result[2] if len(result) == 4 else None)

    def read(self, prompt: str) -> list[list[int]]:
        """The token ids that each tokenizer keeps of a prompt: all that `encode` knows of it."""
        parts = [getattr(self._pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
        return [
            part(prompt, truncation=True, max_length=part.model_max_length)["input_ids"]
            for part in parts
            if part is not None
        ]

    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """What classifier-free guidance leads away from where no negative prompt is given, B = 1.

        The empty prompt, but for Stable Diffusion XL zeros, as its pipeline has it
        (`force_zeros_for_empty_prompt`).
        """
        result = self._pipeline.encode_prompt(
            prompt=[""],
            device=self._pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        return Conditioning(result[1], result[3] if len(result) == 4 else None)


def load_text_conditioner(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> TextConditioner:
    """Load the text side of a diffusers pipeline from a directory or a hub id.

    Raises BackboneError when a file is missing or the pipeline has no `encode_prompt`.
    """
    try:
        pipeline = load_parts(
            source, dtype, without=("unet", "vae", "safety_checker", "feature_extractor")
        ).to(device)
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"cannot load the text side of {source}: {error}") from error
    if not hasattr(pipeline, "encode_prompt"):
        raise BackboneError(f"{source}: {type(pipeline).__name__} has no encode_prompt")
    for name in ("tokenizer", "tokenizer_2"):
        if (tokenizer := getattr(pipeline, name, None)) is not None:
            read_control_tokens_as_text(tokenizer)
            _limit(tokenizer, pipeline.text_encoder)
    return TextConditioner(pipeline)


def _limit(tokenizer: Any, text_encoder: Any) -> None:
    """A tokenizer that states no length pads to what its text encoder reads."""
    positions = getattr(text_encoder.config, "max_position_embeddings", None)
    if positions is not None and tokenizer.model_max_length > positions:
        tokenizer.model_max_length = positions


def load_parts(source: str, dtype: torch.dtype, without: Sequence[str]) -> Any:
    """A diffusers pipeline without some of its components, and without those that nobody needs."""
    declared = DiffusionPipeline.load_config(source)
    unused = (*without, "image_encoder")
    # Named None, a part is neither looked for nor loaded.
    absent = {name: None for name in unused if name in declared}
    variant = variant_of("image_generator", source)
    return DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=variant, **absent)
