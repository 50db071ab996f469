"""The tiny CLIP: model and tokenizer in a directory that open_clip loads as `local-dir:`."""

import json
import random
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from miniature.drawing import PICTURE_SIZE, render
from miniature.language import caption, picture_caption
from miniature.optimization import Optimization, Recipe, Report
from miniature.recipe_autoencoder import as_tensor
from miniature.vocabulary import TEXT_LENGTH, clip_tokenizer
from miniature.world import SCENES, SCENES_OF, SPLIT_OF


class VisualEncoderRecipe(Recipe):
    """Sizes and training of the tiny CLIP."""

    width: int = 96  # d
    num_layers: int = 3
    patch: int = 16  # pixels
    text_width: int = 64  # D
    text_layers: int = 2
    text_heads: int = 4
    joint_width: int = 64
    pictures_per_scene: int = 20
    captions_per_picture: int = 3
    num_steps: int = 1400
    batch: int = 160  # scenes, no two alike
    complete_share: float = 0.3  # of the captions that tell everything
    matrix_rate: float = 0.01
    other_rate: float = 2e-3


def model_config(recipe: VisualEncoderRecipe, vocabulary_size: int) -> dict:
    """The `model_cfg` of `open_clip_config.json`."""
    return {
        "embed_dim": recipe.joint_width,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": PICTURE_SIZE,
            "patch_size": recipe.patch,
            "layers": recipe.num_layers,
            "width": recipe.width,
            "head_width": 32,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            "context_length": TEXT_LENGTH,
            "vocab_size": vocabulary_size,
            "width": recipe.text_width,
            "heads": recipe.text_heads,
            "layers": recipe.text_layers,
            "hf_tokenizer_name": "the tokenizer in this directory",
        },
    }


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int64 [N, L]: begin, words, end, and the end again up to L, as Stable Diffusion pads."""
    tokens = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True)
    return torch.tensor(tokens["input_ids"])


def train(
    directory: Path, recipe: VisualEncoderRecipe, seed: int, report: Report
) -> dict[str, float]:
    """Trains on captioned pictures of training scenes, writes float16, and returns the scores."""
    torch.manual_seed(seed)
    rng = random.Random(f"captions for the visual encoder {seed}")
    tokenizer = clip_tokenizer()
    config = model_config(recipe, len(tokenizer))
    model = CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=CLIPTextCfg(**config["text_cfg"]),
    )
    scenes = SCENES_OF["train"]
    number = recipe.pictures_per_scene
    # [pictures of a scene, scenes, 3, H, W].
    pictures = as_tensor(render(scenes * number, seed)).view(
        number, len(scenes), 3, PICTURE_SIZE, PICTURE_SIZE
    )
    captions = [
        caption(scene, rng) if rng.random() < recipe.complete_share else picture_caption(scene, rng)
        for _ in range(number * recipe.captions_per_picture)
        for scene in scenes
    ]
    # [captions of a scene, scenes, L], in the order in which they were written.
    tokens = tokenize(tokenizer, captions).view(-1, len(scenes), TEXT_LENGTH)

    named = [(n, p) for n, p in model.named_parameters() if n != "logit_bias"]
    optimization = Optimization(named, recipe.num_steps, recipe.matrix_rate, recipe.other_rate)
    for step in optimization.steps("visual encoder", report):
        # Different scenes only: two pictures of one scene would be each other's wrong negatives.
        chosen = torch.randperm(len(scenes))[: recipe.batch]
        # Any picture of a scene with any caption of it: all pairs of one scene are true.
        images = pictures[torch.randint(0, number, chosen.shape), chosen]
        texts = tokens[torch.randint(0, len(tokens), chosen.shape), chosen]
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * _similarity(model, images, texts)
        target = torch.arange(len(chosen))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimization.step(loss)
        if (step + 1) % 500 == 0:
            report(f"visual encoder: {measure(model.eval(), tokenizer)}")
            model.train()
    model.eval()
    write(model, tokenizer, config, directory)
    return measure(model, tokenizer)


def _similarity(model: CLIP, images: Tensor, texts: Tensor) -> Tensor:
    return model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T


def load(directory: Path) -> tuple[CLIP, CLIPTokenizer]:
    """What `write` wrote, in float32."""
    model = open_clip.create_model(f"local-dir:{directory}", precision="fp32")
    return model.eval(), CLIPTokenizer.from_pretrained(directory)


def write(model: CLIP, tokenizer: CLIPTokenizer, config: dict, directory: Path) -> None:
    """Writes a directory that open_clip loads as `local-dir:`; the weights in float16."""
    directory.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (directory / "open_clip_config.json").write_text(text + "\n")
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, directory / "open_clip_model.safetensors")
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def measure(model: CLIP, tokenizer: CLIPTokenizer, seed: int = 1) -> dict[str, float]:
    """How often a complete caption finds its picture among one picture of each of the 576 scenes.

    `recall_at_1` over all captions; `recall_at_1_held_out` over those of validation and test
    scenes; `attributes` is the share of attributes that the found picture has right.
    """
    rng = random.Random(f"captions to find pictures with {seed}")
    tokens = tokenize(tokenizer, [caption(scene, rng) for scene in SCENES])
    found = _similarity(model, as_tensor(render(SCENES, seed)), tokens).argmax(0)
    right = (found == torch.arange(len(SCENES))).float()
    held_out = torch.tensor([SPLIT_OF[scene] != "train" for scene in SCENES])
    codes = torch.tensor([scene.codes for scene in SCENES])
    return {
        "recall_at_1": round(right.mean().item(), 4),
        "recall_at_1_held_out": round(right[held_out].mean().item(), 4),
        "attributes": round((codes[found] == codes).float().mean().item(), 4),
    }


def measure_written(directory: Path) -> dict[str, float]:
    """The scores of what lies in a directory."""
    return measure(*load(directory))
