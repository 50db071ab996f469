"""Random tiny models saved in the real on-disk formats, for tests of the real loaders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """A CLIP tokenizer that knows single letters, with and without the end-of-word mark."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = list(LETTERS) + [f"{letter}</w>" for letter in LETTERS]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length
    )


def _text_config(width: int, length: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projection,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def stable_diffusion(
    folder: Path, *, width: int = 16, length: int = 12, cross: int | None = None
) -> Path:
    """A StableDiffusionPipeline directory with random weights; 16x16 pictures."""
    text = CLIPTextModel(_text_config(width, length, width))
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    return _save_stable_diffusion(folder, length, text, cross or width, scheduler)


def stable_diffusion_2(folder: Path, *, width: int = 24, length: int = 12) -> Path:
    """As published for 2.x: OpenCLIP's text encoder less its last layer, v-prediction."""
    config = _text_config(width, length, 20)
    config.hidden_act, config.pad_token_id = "gelu", 0
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        steps_offset=1,
    )
    return _save_stable_diffusion(folder, length, CLIPTextModel(config), width, scheduler)


def _save_stable_diffusion(
    folder: Path, length: int, text: CLIPTextModel, cross: int, scheduler: DDIMScheduler
) -> Path:
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=text,
        tokenizer=clip_tokenizer(folder / "tmp", length),
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=cross,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def stable_diffusion_xl(folder: Path, *, length: int = 12, zeros: bool = True) -> Path:
    """A StableDiffusionXLPipeline directory with random weights: widths 16 + 24, pooled 20.

    zeros: as published, what has no negative prompt is led away from zeros.
    """
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tmp", length)
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(16, length, 16)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(24, length, 20)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=40,
            attention_head_dim=4,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 20,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def visual_encoder(folder: Path, *, width: int = 32, quick_gelu: bool = False) -> Path:
    """An open_clip `local-dir:` directory with a random vision transformer; 16x16 pictures."""
    vision = {"image_size": 16, "layers": 2, "width": width, "head_width": 16, "patch_size": 8}
    return _save_open_clip(folder, {"quick_gelu": quick_gelu, "vision_cfg": vision})


@register_model
def vit_test_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The tiny sister of timm's `vit_base_patch16_siglip_224`."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    taken = {name: kwargs[name] for name in ("num_classes", "global_pool") if name in kwargs}
    return VisionTransformer(**sizes, class_token=False, act_layer="gelu_tanh", **taken)


def siglip(folder: Path) -> Path:
    """As `visual_encoder`, with open_clip's SigLIP: a timm trunk pooled by attention (`map`)."""
    vision = {
        "image_size": 16,
        "timm_model_name": "vit_test_siglip",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    return _save_open_clip(folder, {"custom_text": True, "vision_cfg": vision}, embed_dim=24)


def _save_open_clip(folder: Path, config: dict, embed_dim: int = 12) -> Path:
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    config = {"embed_dim": embed_dim, **config, "text_cfg": text}
    mean, std = list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std}})
    )
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
