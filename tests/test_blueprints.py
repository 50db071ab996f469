"""Models built without weights: sizes beside published ones, and beside those loaded from disk."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from torch.profiler import ProfilerActivity, profile

from doctor.blueprints import (
    count_parameters,
    find,
    generator_blueprint,
    language_model_blueprint,
    visual_encoder_blueprint,
)
from doctor.memory import features_memory, generation_memory, targets_memory, weight_bytes
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.image_generator import load_image_generator
from pipeline.frozen.pinning import resolve_backbone
from pipeline.frozen.text_conditioner import load_text_conditioner
from pipeline.frozen.visual_encoder import load_visual_encoder
from pipeline.settings import GenerationSettings


@pytest.mark.parametrize(
    ("source", "parameters", "e"),
    [
        ("facebook/opt-125m", 125_239_296, 768),
        ("facebook/opt-350m", 331_196_416, 512),
        ("facebook/opt-6.7b", 6_658_473_984, 4096),
        ("gpt2", 124_439_808, 768),
        ("EleutherAI/pythia-1.4b", 1_414_647_808, 2048),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616, 4096),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400, 2048),
        ("Qwen/Qwen2.5-7B", 7_615_616_512, 3584),
        ("Qwen/Qwen3-0.6B", 596_049_920, 1024),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552, 4096),
    ],
)
def test_language_models_have_their_published_parameters(source, parameters, e):
    blueprint = language_model_blueprint(find("language_model", source), torch.bfloat16)
    assert blueprint.parameters == parameters
    assert blueprint.build(1).width == e


@pytest.mark.parametrize(
    ("source", "unet", "texts", "L", "D", "pooled", "pixels"),
    [
        ("runwayml/stable-diffusion-v1-5", 859_520_964, [123_060_480], 77, 768, None, 512),
        ("stabilityai/stable-diffusion-2-1", 865_910_724, [340_387_840], 77, 1024, None, 768),
        (
            "stabilityai/stable-diffusion-xl-base-1.0",
            2_567_463_684,
            [123_060_480, 694_659_840],
            77,
            2048,
            1280,
            1024,
        ),
    ],
)
def test_generators_have_their_published_parameters(source, unet, texts, L, D, pooled, pixels):
    found = generator_blueprint(find("image_generator", source), torch.float16)
    assert count_parameters(found.unet) == unet
    assert count_parameters(found.vae) == 83_653_863
    assert [count_parameters(encoder) for encoder in found.text_encoders] == texts
    assert (found.length, found.text_width, found.pooled_width) == (L, D, pooled)
    assert found.cross_attention_width == D
    assert found.picture_size == pixels


@pytest.mark.parametrize(
    ("source", "d", "vision"),
    [
        # As published, less the projection of 1024 x 768 that GILL leaves out.
        ("ViT-L-14-quickgelu:openai", 1024, 303_966_208 - 1024 * 768),
        ("timm/ViT-SO400M-14-SigLIP-384", 1152, 428_225_600),
    ],
)
def test_visual_encoders_have_their_published_parameters(source, d, vision):
    encoder, _ = visual_encoder_blueprint(find("visual_encoder", source), torch.float32)
    assert encoder.width == d
    assert count_parameters(encoder.model.visual) == vision


def test_openai_weights_without_quickgelu_are_refused():
    with pytest.raises(BackboneError, match="ViT-L-14-quickgelu:openai"):
        visual_encoder_blueprint(find("visual_encoder", "ViT-L-14:openai"), torch.float32)


def test_directories_give_the_widths_of_the_manifest(tmp_path):
    xl = tiny_models.stable_diffusion_xl(tmp_path / "xl")
    widths = resolve_backbone("image_generator", str(xl)).widths
    found = generator_blueprint(find("image_generator", str(xl)), torch.float32)
    assert found.length == widths["L"]
    assert found.text_width == widths["text_width"]
    assert found.cross_attention_width == widths["cross_attention_width"]
    assert found.pooled_width == widths["pooled_width"]
    assert found.picture_size == widths["picture_size"]
    clip = tiny_models.visual_encoder(tmp_path / "clip")
    encoder, _ = visual_encoder_blueprint(find("visual_encoder", str(clip)), torch.float32)
    loaded = load_visual_encoder(f"local-dir:{clip}")
    assert encoder.width == loaded.width
    assert weight_bytes(encoder.model) == weight_bytes(loaded.model)


def test_what_is_unknown_says_what_to_do():
    with pytest.raises(BackboneError, match="allow_download.*local directory"):
        language_model_blueprint(find("language_model", "nobody/nothing"), torch.float32)
    with pytest.raises(BackboneError, match="neither a directory|no such directory"):
        find("language_model", "/no/such/place")


def test_a_directory_without_configuration_or_weights(tmp_path):
    with pytest.raises(BackboneError, match=r"config\.json is missing"):
        find("language_model", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert not find("language_model", str(tmp_path)).has_weights


def test_the_hub_cache_is_read_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "models--nobody--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 8}
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    found = find("language_model", "nobody/tiny")
    assert (found.place, found.has_weights) == ("hub cache", False)
    model = language_model_blueprint(found, torch.float32).build()
    assert (model.width, model.max_positions) == (16, 8)


def _allocated_at_most(call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    total = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def test_encoding_takes_what_was_predicted(tmp_path):
    clip = tiny_models.visual_encoder(tmp_path / "clip", width=64)
    encoder, _ = visual_encoder_blueprint(find("visual_encoder", str(clip)), torch.float32)
    real, pixels = load_visual_encoder(f"local-dir:{clip}"), torch.zeros(64, 3, 16, 16).byte()
    predicted = features_memory(encoder, 64, "cpu").working
    assert predicted == pytest.approx(
        _allocated_at_most(lambda: real.pooled(real.normalise(pixels))), rel=0.2
    )

    diffusion = tiny_models.stable_diffusion(tmp_path / "sd", width=64)
    generator = generator_blueprint(find("image_generator", str(diffusion)), torch.float32)
    conditioner = load_text_conditioner(str(diffusion))
    predicted = targets_memory(generator, 64, "cpu").working
    measured = _allocated_at_most(lambda: conditioner.encode(["a b c"] * 64))
    assert predicted == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("slicing", [False, True])
def test_generation_takes_what_was_predicted(tmp_path, slicing):
    diffusion = tiny_models.stable_diffusion(tmp_path / "sd", width=64)
    blueprint = generator_blueprint(find("image_generator", str(diffusion)), torch.float32)
    settings = GenerationSettings(steps=2, batch_size=8, vae_slicing=slicing)
    predicted = generation_memory(blueprint, settings, "cpu")
    generator = load_image_generator(str(diffusion))
    prompts = Conditioning(torch.zeros(8, blueprint.length, 64))
    empty = Conditioning(torch.zeros(1, blueprint.length, 64))

    def generate():
        generator.generate(prompts, empty, seeds=range(8), settings=settings)

    generate()
    expected = pytest.approx(_allocated_at_most(generate), rel=0.2)
    assert predicted.data + predicted.working == expected
