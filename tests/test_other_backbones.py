"""Other frozen models than the shipped ones through the stages: XL whole, and mixed-up widths."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from stage_runs import refusal, run
from tiny_language_models import tiny_model, tiny_tokenizer

from cache import open_store, read_rows
from gill.artifacts import ARTIFACTS
from gill.dimensions import DimensionError, check_dimensions
from gill.loading import Gill, read_empty_prompt
from pipeline.bridge.checkpoint import read_record
from pipeline.frozen.backbones import Backbones
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.image_generator import load_image_generator
from pipeline.settings import GenerationNumbers, GenerationSettings
from pipeline.talking.answers import GeneratedImage

CAPTIONS = [" ".join("abcdefghijkl"[i : i + 3]) for i in range(10)]
SETTINGS = GenerationSettings(steps=2, guidance=3.0, scheduler="ddim", batch_size=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of tiny models by name."""
    root = tmp_path_factory.mktemp("models")
    language_model = root / "llama"
    tiny_model("llama-untied-grouped", torch.float32).save_pretrained(language_model)
    tiny_tokenizer().save_pretrained(language_model)
    return {
        "language_model": str(language_model),
        "visual_encoder": str(tiny_models.visual_encoder(root / "clip")),
        "wider visual encoder": str(tiny_models.visual_encoder(root / "clip-48", width=48)),
        "image_generator": str(tiny_models.stable_diffusion_xl(root / "xl")),
        "sd 2": str(tiny_models.stable_diffusion_2(root / "sd2")),
    }


@pytest.fixture(scope="module")
def world(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder where XL's targets were computed and two steps were trained on them."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = ["caption\timage"]
        for i, caption in enumerate(CAPTIONS):
            Image.new("RGB", (20, 20), (20 * i, 255 - 20 * i, 90)).save(f"{i}.png")
            rows.append(f"{caption}\t{i}.png")
        Path("table.tsv").write_text("\n".join(rows) + "\n")
        _write(models)
        for stage in (
            "prepare-captions",
            "prepare-backbones",
            "precompute-features",
            "precompute-targets",
            "train",
        ):
            run(stage)
        yield folder


def _write(models: dict[str, str], **backbones: Any) -> None:
    names = ("language_model", "visual_encoder", "image_generator")
    params = {
        "run": {
            "device": "cpu",
            "checkpoint_every": 2,
            "batch_sizes": {"targets": 1, "pictures": SETTINGS.batch_size},
        },
        "captions": {"table": "table.tsv", "val_fraction": 0.0, "test_fraction": 0.0},
        "backbones": {**{name: models[name] for name in names}, **backbones},
        # Bits are equal where both sides encode the same batch: a text encoder rounds with it.
        "targets": {"codec": {"dtype": "float32"}},
        "model": {"k": 2, "r": 3, "m": 8, "p": 6, "mapper": {"adds_embedding": False}},
        "batches": {"validation_rows": 0},
        "training": {"steps": 2, "batch_size": 4, "validate_every": 2},
        "generation": SETTINGS.model_dump(include=set(GenerationNumbers.model_fields)),
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))


def test_targets_in_the_cache_make_the_pictures_of_the_text_itself(world, models) -> None:
    spec = open_store(ARTIFACTS.targets).spec
    assert {name: array.shape for name, array in spec.arrays.items()} == {
        "embedding": (12, 40),
        "pooled": (20,),
    }
    rows = np.arange(3)
    read = read_rows(ARTIFACTS.targets, rows, ["embedding", "pooled"])
    cached = Conditioning(*(torch.from_numpy(read[name]) for name in ("embedding", "pooled")))
    generator = load_image_generator(models["image_generator"])
    empty = read_empty_prompt(ARTIFACTS, lambda: pytest.fail("the store has it"))
    ours = generator.generate(cached, empty, seeds=[1, 2, 3], settings=SETTINGS)
    whole = DiffusionPipeline.from_pretrained(models["image_generator"])
    whole.scheduler = generator._pipeline.scheduler
    for i, mine in enumerate(ours):
        [theirs] = whole(
            CAPTIONS[i],
            num_inference_steps=SETTINGS.steps,
            guidance_scale=SETTINGS.guidance,
            generator=[torch.Generator().manual_seed(1 + i)],
        ).images
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    # What float16, the default codec, costs instead of equality: at most a grey level or two.
    halved = Conditioning(cached.embedding.half().float(), cached.pooled.half().float())
    near = generator.generate(halved, empty, seeds=[1, 2, 3], settings=SETTINGS)
    differences = [
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(ours, near)
    ]
    assert max(differences) <= 2


def test_the_pooled_output_is_trained_and_reaches_the_generator(world) -> None:
    record = read_record(ARTIFACTS.model / "last.safetensors")
    assert (record.sizes.D, record.sizes.D_pooled, record.step) == (40, 20, 2)
    gill = Gill.load(ARTIFACTS.root, device="cpu")
    heads = gill.heads
    assert heads.pooled_projection is not None
    torch.manual_seed(0)
    untrained = type(heads)(record.sizes).pooled_projection
    assert untrained is not None
    assert heads.pooled_projection.weight.shape == (20, record.sizes.e)
    assert (heads.pooled_projection.weight - untrained.weight).abs().max() > 1e-4
    reply = gill.reply(["a b c"], want="generate", max_tokens=2)
    [picture] = [part for part in reply if isinstance(part, GeneratedImage)]
    assert picture.picture.size == (16, 16)


def test_the_manifest_says_what_auto_came_to(world) -> None:
    backbones = Backbones.read(ARTIFACTS.backbones)
    assert {getattr(backbones, role).dtype for role in Backbones.model_fields} == {"float32"}
    assert backbones.language_model.quantization == "none"


AFTER = ("train", "build-index", "fit-decision", "evaluate", "precompute-targets")


@pytest.mark.parametrize("stage", AFTER)
def test_params_that_name_another_generator_than_the_manifest(world, models, stage) -> None:
    _write(models, image_generator=models["sd 2"])
    said = refusal(stage)
    assert models["sd 2"] in said
    assert models["image_generator"] in said
    assert "run `stages prepare-backbones`" in said


@pytest.fixture
def sd_2(world, models) -> Any:
    """The manifest now pins SD 2; the targets and the heads are XL's."""
    manifest = ARTIFACTS.backbones.read_text()
    _write(models, image_generator=models["sd 2"])
    run("prepare-backbones")
    yield models
    ARTIFACTS.backbones.write_text(manifest)
    _write(models)


def test_a_cache_of_one_generator_and_another_generator(sd_2) -> None:
    said = refusal("train")
    assert "D, the generator's text width, is 40 in artifacts/targets.zarr" in said
    assert f"24 for {sd_2['sd 2']}: run `stages precompute-targets --rebuild`" in said
    assert "D_pooled" in said
    assert "is 20" in said


def test_targets_of_another_generator_are_another_store(sd_2) -> None:
    first = ARTIFACTS.targets.resolve()
    assert f"this run encoded {len(CAPTIONS)} " in run("precompute-targets")
    spec = open_store(ARTIFACTS.targets).spec
    assert {name: array.shape[-1] for name, array in spec.arrays.items()} == {"embedding": 24}
    _write(sd_2)
    run("prepare-backbones")
    assert "nothing to do" in run("precompute-targets")
    assert ARTIFACTS.targets.resolve() == first


@pytest.mark.parametrize("stage", ["build-index", "fit-decision", "evaluate"])
def test_heads_of_one_generator_and_another_generator(sd_2, stage) -> None:
    said = refusal(stage)
    heads = "D, the generator's text width, is 40 in the trained heads artifacts/model/"
    assert heads in said
    assert re.search(
        f"24 for {sd_2['sd 2']}: run `stages train`, or name the model they were", said
    )


@pytest.mark.parametrize("stage", ["train", "build-index"])
def test_features_of_another_visual_encoder(world, models, stage) -> None:
    manifest = ARTIFACTS.backbones.read_text()
    _write(models, visual_encoder=models["wider visual encoder"])
    run("prepare-backbones")
    said = refusal(stage)
    ARTIFACTS.backbones.write_text(manifest)
    _write(models)
    assert "d, the visual width, is 32 in artifacts/features.zarr" in said
    assert f"48 for {models['wider visual encoder']}" in said


def test_other_weights_of_the_same_widths_are_seen_too(world, models) -> None:
    backbones = Backbones.read(ARTIFACTS.backbones)
    encoder = backbones.visual_encoder.model_copy(update={"fingerprint": "0" * 64})
    text = ARTIFACTS.backbones.read_text()
    backbones.model_copy(update={"visual_encoder": encoder}).write(ARTIFACTS.backbones)
    with pytest.raises(DimensionError, match=r"features.zarr was made with other weights"):
        check_dimensions(ARTIFACTS, ("features",))
    ARTIFACTS.backbones.write_text(text)
    check_dimensions(ARTIFACTS, ("features", "targets", "heads"))


def test_a_quantised_language_model_is_another_one(world, models) -> None:
    manifest = ARTIFACTS.backbones.read_text()
    _write(models, language_model_quantization="int8")
    assert "language_model_quantization is int8, but" in refusal("build-index")
    assert "int8" in run("prepare-backbones")
    said = refusal("build-index")
    ARTIFACTS.backbones.write_text(manifest)
    _write(models)
    assert "the language model is another one" in said
    assert "int8:" in said


def test_a_language_model_that_cannot_serve_stops_prepare_backbones(world, models, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(
        BloomConfig(vocab_size=57, hidden_size=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    _write(models, language_model=str(tmp_path))
    said = refusal("prepare-backbones")
    _write(models)
    assert f"{tmp_path} cannot serve as the language model: its positions are ALiBi" in said


def test_a_missing_extra_stops_prepare_backbones(world, models, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    _write(models, language_model_quantization="nf4")
    said = refusal("prepare-backbones")
    _write(models)
    assert "pip install '.[quantized]'" in said
