"""Models of published sizes with random weights, born on the device in their dtype, and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from doctor.blueprints import born
from doctor.known_models import GENERATORS, LANGUAGE_MODELS
from miniature.backbones import SHIPPED
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.backbones import Quantization
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.quantization import quantize
from pipeline.settings import MapperSizes
from tests.tiny_language_models import tiny_tokenizer

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LENGTHS = (5, 8, 9, 10, 11, 12, 14, 19)
MAX_TOKENS = 23
TOY_OPT: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 32,
    "vocab_size": 72,
    "max_position_embeddings": 640,
}
TOY_HEADS: dict[str, Any] = {
    "e": 32,
    "d": 8,
    "r": 2,
    "L": 3,
    "D": 6,
    "m": 8,
    "p": 4,
    "mapper": MapperSizes(encoder_layers=1, decoder_layers=1),
}


def opt_config(size: str) -> OPTConfig:
    """OPT's configuration; `size` as in its hub id (`6.7b`), or `toy`."""
    return OPTConfig(
        **(TOY_OPT if size == "toy" else LANGUAGE_MODELS[f"facebook/opt-{size}"].sizes)
    )


def head_sizes(size: str) -> HeadSizes:
    """The paper's heads around OPT of `size`."""
    width = opt_config(size).hidden_size
    return HeadSizes(**TOY_HEADS) if size == "toy" else HeadSizes(d=1024, e=width)


def opt_gill(
    size: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization = "none",
    talks: bool = False,
) -> MultimodalLanguageModel:
    """GILL around OPT, its heads in float32. `talks`: weights are so large that it does not say one
    word for ever."""
    config = opt_config(size)
    if talks:
        config.init_std = 2.8 / config.hidden_size**0.5
    with born(dtype, device):
        model = OPTForCausalLM(config)
    if quantization != "none":
        quantize(model, quantization, device)
    num_rows = config.vocab_size - 6  # those of OPT's tokenizer
    language_model = LanguageModel(model, tiny_tokenizer(), num_rows=num_rows)
    with torch.device(device):
        return MultimodalLanguageModel(language_model, Heads(head_sizes(size)))


def batch_of(
    gill: MultimodalLanguageModel, num_examples: int, seed: int | None = None
) -> CaptionBatch:
    """Random captions of 11 tokens on average, of always the same lengths or of `seed`'s; random
    features, and one random target for all."""
    random = torch.Generator().manual_seed(seed or 0)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(num_examples)]
    if seed is not None:
        drawn = torch.empty(num_examples).log_normal_(2.3, 0.4, generator=random)
        lengths = drawn.round().clamp(2, MAX_TOKENS).int().tolist()
    sizes, words = gill.heads.sizes, gill.language_model.num_rows - 8
    return CaptionBatch.from_lists(
        [torch.randint(5, words, (n,), generator=random).tolist() for n in lengths],
        torch.randn(num_examples, sizes.d, generator=random),
        torch.randn(1, sizes.L, sizes.D, generator=random).repeat(num_examples, 1, 1),
        torch.arange(num_examples),
        max_tokens=MAX_TOKENS,
    ).to(gill.language_model.device)


def stable_diffusion(*parts: str, toy: bool, dtype: torch.dtype, device: str) -> Any:
    """A diffusers pipeline with these `parts` of Stable Diffusion 1.5 alone (`unet`, `vae`,
    `text_encoder`); toy: of the miniature. Tokenizer and scheduler are always the miniature's."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    known = GENERATORS[STABLE_DIFFUSION]
    make: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**known.unet),
        "vae": lambda: AutoencoderKL(**known.vae),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**known.text_encoders[0])),
    }
    replaced: dict[str, Any] = {name: None for name in make if name not in parts}
    if not toy:
        with born(dtype, device):
            replaced |= {name: make[name]().eval().requires_grad_(False) for name in parts}
    source = SHIPPED.image_generator
    pipeline: Any = StableDiffusionPipeline.from_pretrained(source, dtype=dtype, **replaced)
    if not toy:
        pipeline.tokenizer.model_max_length = known.length
    return pipeline.to(device)
