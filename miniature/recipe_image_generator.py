"""The tiny image generator: text encoder and UNet, with the autoencoder a complete diffusers
StableDiffusionPipeline.

The text encoder starts as the tiny CLIP's text tower, as Stable Diffusion's is CLIP's, and is
trained on with the UNet.
"""

import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miniature.drawing import render
from miniature.language import caption, picture_caption
from miniature.optimization import Optimization, Recipe, Report
from miniature.oracle import score
from miniature.recipe_autoencoder import as_tensor, encode
from miniature.recipe_autoencoder import load as load_autoencoder
from miniature.recipe_visual_encoder import tokenize
from miniature.vocabulary import TEXT_LENGTH, clip_tokenizer
from miniature.world import SCENES_OF, Scene, Split, draw_scene

# How it is meant to be sampled; the scheduler, DPM-Solver++, is in its directory.
SAMPLING_STEPS = 12
GUIDANCE = 2.5
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
}


class ImageGeneratorRecipe(Recipe):
    """Sizes and training of the tiny UNet and text encoder."""

    widths: tuple[int, int] = (32, 64)
    pictures_per_scene: int = 24
    captions_per_picture: int = 3
    complete_share: float = 0.4  # of the captions that tell everything
    caption_dropout: float = 0.1  # share of captions replaced by the empty one
    num_steps: int = 3500
    batch: int = 48
    averaging: float = 0.998  # decay of the exponential moving average kept
    matrix_rate: float = 0.01
    other_rate: float = 2e-3
    text_encoder_share: float = 0.2  # of both rates, for the text encoder


def text_encoder_from_clip(directory: Path) -> CLIPTextModel:
    """The text tower of an open_clip directory as a `CLIPTextModel`."""
    tower = load_file(directory / "open_clip_model.safetensors")
    vocabulary, width = tower["token_embedding.weight"].shape
    num_layers = 1 + max(
        int(name.split(".")[2]) for name in tower if name.startswith("transformer.resblocks.")
    )
    tokenizer = clip_tokenizer()
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            hidden_act="gelu",
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    state = {
        "embeddings.token_embedding.weight": tower["token_embedding.weight"],
        "embeddings.position_embedding.weight": tower["positional_embedding"],
    }
    renamed = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        state[f"final_layer_norm.{kind}"] = tower[f"ln_final.{kind}"]
        for layer in range(num_layers):
            theirs, ours = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            # open_clip keeps the three projections as one matrix, [3 D, D].
            for part, value in zip("qkv", tower[f"{theirs}.attn.in_proj_{kind}"].chunk(3)):
                state[f"{ours}.self_attn.{part}_proj.{kind}"] = value
            for old, new in renamed.items():
                state[f"{ours}.{new}.{kind}"] = tower[f"{theirs}.{old}.{kind}"]
    # Before transformers 5.6 everything sat under `text_model.`.
    prefix = "text_model." if hasattr(encoder, "text_model") else ""
    encoder.load_state_dict({prefix + name: value.float() for name, value in state.items()})
    return encoder


class _Generator(nn.Module):
    """Text encoder and UNet together, so that one moving average covers both."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        text = self.text_encoder(input_ids=tokens).last_hidden_state
        return self.unet(noisy, time, text).sample


def train(
    directory: Path, recipe: ImageGeneratorRecipe, seed: int, report: Report
) -> dict[str, float]:
    """Trains on captioned pictures of training scenes, writes the pipeline in float16, and
    returns its scores. Autoencoder and visual encoder lie beside `directory`.
    """
    autoencoder = load_autoencoder(directory.parent / "autoencoder")
    torch.manual_seed(seed)
    rng = random.Random(f"captions for the image generator {seed}")
    tokenizer = clip_tokenizer()
    text_encoder = text_encoder_from_clip(directory.parent / "visual_encoder")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=autoencoder.config["latent_channels"],
        out_channels=autoencoder.config["latent_channels"],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=recipe.widths,
        layers_per_block=1,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    generator = _Generator(text_encoder, unet)
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(recipe.averaging))

    scenes = SCENES_OF["train"] * recipe.pictures_per_scene
    # Other pictures than the autoencoder was trained on.
    latents = encode(autoencoder, as_tensor(render(scenes, seed + 1)))
    latents *= autoencoder.config["scaling_factor"]
    captions = [
        caption(scene, rng) if rng.random() < recipe.complete_share else picture_caption(scene, rng)
        for _ in range(recipe.captions_per_picture)
        for scene in scenes
    ]
    # [captions of a picture, pictures, L]: captions were written a round of all scenes at a time.
    tokens = tokenize(tokenizer, captions).view(-1, len(scenes), TEXT_LENGTH)
    empty = tokenize(tokenizer, [""])[0]

    noising = DDPMScheduler(**_NOISE)
    optimization = Optimization(
        generator.named_parameters(),
        recipe.num_steps,
        recipe.matrix_rate,
        recipe.other_rate,
        lambda name: recipe.text_encoder_share if name.startswith("text_encoder") else 1.0,
    )
    for step in optimization.steps("image generator", report):
        chosen = torch.randint(0, len(scenes), (recipe.batch,))
        text = tokens[torch.randint(0, len(tokens), chosen.shape), chosen]
        # The empty caption is what classifier-free guidance leads away from: it must be known.
        text[torch.rand(recipe.batch) < recipe.caption_dropout] = empty
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        time = torch.randint(0, noising.config.num_train_timesteps, (recipe.batch,))
        predicted = generator(noising.add_noise(clean, noise, time), time, text)
        loss = F.mse_loss(predicted, noising.get_velocity(clean, noise, time))
        optimization.step(loss)
        averaged.update_parameters(generator)
        # The moving average is kept, measured and written, not the weights in training.
        if (step + 1) % 1000 == 0 or step + 1 == recipe.num_steps:
            kept = cast(_Generator, averaged.module).eval()
            scores = measure(assemble(kept, autoencoder, tokenizer), "val", 80)
            report(f"image generator: {scores}")
            write(kept, autoencoder, tokenizer, directory)
    return measure(assemble(kept, autoencoder, tokenizer), "test", 200)


def assemble(
    generator: _Generator, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The complete pipeline."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=generator.text_encoder,
        tokenizer=tokenizer,
        unet=generator.unet,
        scheduler=DPMSolverMultistepScheduler(**_NOISE),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(directory: Path) -> StableDiffusionPipeline:
    """What `write` wrote, in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write(
    generator: _Generator, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, directory: Path
) -> None:
    """Writes a directory that `StableDiffusionPipeline.from_pretrained` loads, in float16."""
    halves = deepcopy(generator).half(), deepcopy(autoencoder).half()
    assemble(*halves, tokenizer).save_pretrained(directory)


def measure_written(directory: Path) -> dict[str, float]:
    """The scores of what lies in a directory."""
    return measure(load(directory), "test", 200)


def generate(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], seed: int = 1
) -> NDArray[np.uint8]:
    """One picture per caption, uint8 [N, 64, 64, 3], with the miniature's usual steps and
    guidance.
    """
    parts = []
    for start in range(0, len(captions), 50):
        part = list(captions[start : start + 50])
        # By each picture's place, not by its batch.
        noise = [
            torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))
        ]
        pictures = pipeline(
            part,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE,
            generator=noise,
            output_type="np",
        ).images
        parts.append((pictures * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def measure(
    pipeline: StableDiffusionPipeline, split: Split, num_pictures: int, seed: int = 1
) -> dict[str, float]:
    """What the oracle reads in pictures generated from complete captions of scenes of a split."""
    rng = random.Random(f"captions to generate from {split} {seed}")
    scenes: list[Scene] = [draw_scene(rng, split) for _ in range(num_pictures)]
    pictures = generate(pipeline, [caption(scene, rng) for scene in scenes], seed)
    return {name: round(value, 4) for name, value in score(pictures, scenes).items()}
