"""The recipe that makes the backbones, run for one step each: it goes on where it stopped."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from miniature import (
    recipe_autoencoder,
    recipe_image_generator,
    recipe_language_model,
    recipe_visual_encoder,
)
from miniature.optimization import Muon, Optimization, orthogonalize
from miniature.recipe import PARTS, Recipes, train_backbones


@pytest.fixture
def quick(monkeypatch) -> Recipes:
    """One step of each part on few pictures, and no scores: those of one step mean nothing."""
    modules = (
        recipe_autoencoder,
        recipe_image_generator,
        recipe_language_model,
        recipe_visual_encoder,
    )
    for module in modules:
        monkeypatch.setattr(module, "measure", lambda *_, **__: {"score": 0.5})
    few = {"pictures_per_scene": 1}
    recipes = Recipes().shortened(1e-9)
    return recipes.model_copy(
        update={
            part: getattr(recipes, part).model_copy(update=few)
            for part in ("autoencoder", "visual_encoder", "image_generator")
        }
    )


def weights(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*.safetensors"))
    }


def test_it_trains_each_part_once_and_again_only_for_another_recipe(quick, tmp_path):
    lines: list[str] = []
    backbones = train_backbones(tmp_path, quick, lines.append)
    assert all(path.is_dir() for path in backbones)
    assert not any("already" in line for line in lines)
    first = weights(tmp_path)
    assert len(first) == 6  # the autoencoder is there by itself and in the generator

    lines.clear()
    train_backbones(tmp_path, quick, lines.append)
    assert lines == [f"{part}: already trained" for part in PARTS]
    assert weights(tmp_path) == first

    lines.clear()
    other = quick.model_copy(update={"seed": 1})
    train_backbones(tmp_path, other, lines.append, only="visual_encoder")
    assert not any("already" in line for line in lines)
    changed = {name for name, content in weights(tmp_path).items() if content != first[name]}
    assert changed == {"visual_encoder/open_clip_model.safetensors"}
    log = json.loads((tmp_path / "visual_encoder.training.json").read_text())
    assert (log["seed"], log["recipe"]["num_steps"], log["scores"]) == (1, 1, {"score": 0.5})

    assert "_name_or_path" not in (
        backbones.image_generator / "vae" / "config.json"
    ).read_text().replace('"_name_or_path": ""', "")


def test_an_interrupted_part_is_trained_anew(quick, tmp_path, monkeypatch):
    def interrupted(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe_autoencoder, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_backbones(tmp_path, quick, lambda line: None, only="autoencoder")
    assert not (tmp_path / "autoencoder.training.json").exists()
    train_backbones(tmp_path, quick, lambda line: None, only="autoencoder")
    assert (tmp_path / "autoencoder.training.json").exists()


def test_the_text_encoder_starts_as_clips_text_tower(quick, tmp_path):
    train_backbones(tmp_path, quick, lambda line: None, only="visual_encoder")
    clip, tokenizer = recipe_visual_encoder.load(tmp_path / "visual_encoder")
    encoder = recipe_image_generator.text_encoder_from_clip(tmp_path / "visual_encoder").eval()
    tokens = recipe_visual_encoder.tokenize(tokenizer, ["a big red ring.", "it turns blue."])
    with torch.no_grad():
        pooled = encoder(input_ids=tokens).pooler_output @ clip.text_projection
        torch.testing.assert_close(pooled, clip.encode_text(tokens), atol=1e-5, rtol=1e-5)


def test_orthogonalized_matrices_have_singular_values_near_one():
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, iterations=6))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_steps_a_convolution_by_its_rate_whatever_the_size_of_the_gradient():
    steps = []
    for scale in (1.0, 1000.0):
        parameter = nn.Parameter(torch.zeros(8, 4, 3, 3))
        generator = torch.Generator().manual_seed(1)
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
        Muon([parameter], lr=0.1).step()
        steps.append(parameter.detach())
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-5)
    assert steps[0].flatten(1).norm() == pytest.approx(0.1 * 8**0.5, rel=0.2)


def test_rates_warm_up_stay_and_fall():
    parameter = nn.Parameter(torch.zeros(3))
    optimization = Optimization([("bias", parameter)], 200, 0.0, other_rate=1.0)
    rates = []
    for _ in range(200):
        optimization.step(parameter.sum())
        rates.append(optimization._optimizers[0].param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1 / 30)
    assert rates[29] == rates[99] == 1.0
    assert rates[149] == pytest.approx(0.51, abs=0.02)
    assert rates[-1] == pytest.approx(0.01)
