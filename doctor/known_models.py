"""Published configurations of frozen models, as data: what can be said of a hub id without network.

Only sizes are typed here, never parameter counts: those are computed from models that
`doctor.blueprints` builds with the real classes on torch's meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

StoredDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class KnownLanguageModel:
    """A decoder-only model: keyword arguments of its transformers configuration."""

    model_type: str
    sizes: dict[str, Any]
    stored: StoredDtype
    """Dtype of the published files."""


@dataclass(frozen=True)
class KnownGenerator:
    """A latent-diffusion pipeline: keyword arguments of its components' classes."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    """`CLIPTextConfig`; the second, where there is one, has a projection."""
    stored: StoredDtype = "float32"
    length: int = 77


def _opt(hidden: int, layers: int, heads: int, **other: Any) -> KnownLanguageModel:
    sizes = {
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "word_embed_proj_dim": hidden,
    }
    return KnownLanguageModel("opt", sizes | other, "float16")


def _gpt2(hidden: int, layers: int, heads: int) -> KnownLanguageModel:
    return KnownLanguageModel(
        "gpt2", {"n_embd": hidden, "n_layer": layers, "n_head": heads}, "float32"
    )


def _pythia(hidden: int, layers: int, heads: int, vocabulary: int = 50304) -> KnownLanguageModel:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    return KnownLanguageModel("gpt_neox", sizes, "float16")


def _gated(
    model_type: str,
    shape: tuple[int, int, int, int, int],
    vocabulary: int,
    tied: bool = False,
    head_dim: int | None = None,
    positions: int = 32768,
    stored: StoredDtype = "bfloat16",
) -> KnownLanguageModel:
    """Llama and its relatives; `shape` is width, feed-forward, layers, heads, key-value heads."""
    hidden, inner, layers, heads, kv_heads = shape
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": positions,
    }
    if head_dim is not None:
        sizes["head_dim"] = head_dim
    return KnownLanguageModel(model_type, sizes, stored)


LANGUAGE_MODELS: dict[str, KnownLanguageModel] = {
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-30b": _opt(7168, 48, 56),
    "facebook/opt-66b": _opt(9216, 64, 72),
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1b": _pythia(2048, 16, 8),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 50432),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _gated(
        "llama", (2048, 5632, 22, 32, 4), 32000, positions=2048
    ),
    "meta-llama/Llama-2-7b-hf": _gated(
        "llama", (4096, 11008, 32, 32, 32), 32000, positions=4096, stored="float16"
    ),
    "meta-llama/Llama-3.1-8B": _gated("llama", (4096, 14336, 32, 32, 8), 128256, positions=131072),
    "meta-llama/Llama-3.2-1B": _gated(
        "llama", (2048, 8192, 16, 32, 8), 128256, True, 64, positions=131072
    ),
    "meta-llama/Llama-3.2-3B": _gated(
        "llama", (3072, 8192, 28, 24, 8), 128256, True, 128, positions=131072
    ),
    "Qwen/Qwen2.5-0.5B": _gated("qwen2", (896, 4864, 24, 14, 2), 151936, True),
    "Qwen/Qwen2.5-1.5B": _gated("qwen2", (1536, 8960, 28, 12, 2), 151936, True),
    "Qwen/Qwen2.5-3B": _gated("qwen2", (2048, 11008, 36, 16, 2), 151936, True),
    "Qwen/Qwen2.5-7B": _gated("qwen2", (3584, 18944, 28, 28, 4), 152064, positions=131072),
    "Qwen/Qwen3-0.6B-Base": _gated("qwen3", (1024, 3072, 28, 16, 8), 151936, True, 128),
    "Qwen/Qwen3-1.7B-Base": _gated("qwen3", (2048, 6144, 28, 16, 8), 151936, True, 128),
    "Qwen/Qwen3-4B-Base": _gated("qwen3", (2560, 9728, 36, 32, 8), 151936, True, 128),
    "Qwen/Qwen3-8B-Base": _gated("qwen3", (4096, 12288, 36, 32, 8), 151936, False, 128),
    "mistralai/Mistral-7B-v0.1": _gated("mistral", (4096, 14336, 32, 32, 8), 32000),
    "mistralai/Mistral-7B-v0.3": _gated("mistral", (4096, 14336, 32, 32, 8), 32768),
}

# Published under two names, or as a base model and its tuned sister of the same sizes.
ALIASES = {
    **{name.split("/")[1]: name for name in LANGUAGE_MODELS if "gpt2" in name},
    **{f"{name}-Instruct": name for name in LANGUAGE_MODELS if "Qwen2.5" in name},
    **{name.removesuffix("-Base"): name for name in LANGUAGE_MODELS if name.endswith("-Base")},
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}

HUB_VISUAL_ENCODERS = {
    "timm/vit_base_patch32_clip_224.openai": "ViT-B-32-quickgelu",
    "timm/vit_base_patch16_clip_224.openai": "ViT-B-16-quickgelu",
    "timm/vit_large_patch14_clip_224.openai": "ViT-L-14-quickgelu",
    "timm/vit_large_patch14_clip_336.openai": "ViT-L-14-336-quickgelu",
    "timm/ViT-B-16-SigLIP": "ViT-B-16-SigLIP",
    "timm/ViT-SO400M-14-SigLIP": "ViT-SO400M-14-SigLIP",
    "timm/ViT-SO400M-14-SigLIP-384": "ViT-SO400M-14-SigLIP-384",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "ViT-H-14",
}
"""Hub ids in open_clip's format, and the architecture that open_clip builds for them."""

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}


def _open_clip_text(hidden: int, layers: int, projection: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "projection_dim": projection,
        "hidden_act": "gelu",
    }


_STABLE_DIFFUSION_1 = KnownGenerator(
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    vae=_VAE,
    text_encoders=(_CLIP_L,),
)


def _stable_diffusion_2(sample_size: int) -> KnownGenerator:
    return KnownGenerator(
        unet={
            "sample_size": sample_size,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        vae=_VAE,
        text_encoders=(_open_clip_text(1024, 23, 512),),
    )


_SDXL = KnownGenerator(
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae=_VAE | {"sample_size": 1024},
    text_encoders=(_CLIP_L, _open_clip_text(1280, 32, 1280)),
)

GENERATORS: dict[str, KnownGenerator] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _STABLE_DIFFUSION_1,
    "CompVis/stable-diffusion-v1-4": _STABLE_DIFFUSION_1,
    "stabilityai/stable-diffusion-2-1": _stable_diffusion_2(96),
    "stabilityai/stable-diffusion-2-1-base": _stable_diffusion_2(64),
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
}


def known_language_model(source: str) -> KnownLanguageModel | None:
    """What is known of a hub id; None: nothing."""
    return LANGUAGE_MODELS.get(ALIASES.get(source, source))


def known_generator(source: str) -> KnownGenerator | None:
    """What is known of a hub id; None: nothing."""
    return GENERATORS.get(ALIASES.get(source, source))
