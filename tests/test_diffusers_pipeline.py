"""GILL as a custom pipeline of diffusers: the same pictures, and diffusers' own knobs on them."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.utils import dynamic_modules_utils
from PIL import Image

from gill.hub import HubError
from gill.loading import Gill
from gill_errors import GillError
from miniature.backbones import SHIPPED
from pipeline.bridge.checkpoint import CheckpointRecord
from pipeline.frozen.backbones import Backbones
from pipeline.frozen.pinning import resolve_backbone
from pipeline.frozen.provenance import provenance_of
from pipeline.talking.generation import generate_pictures
from pipeline.talking.reading import read_contexts
from tests.tiny_gill import FEW, tiny_gill
from tests.tiny_models import stable_diffusion_xl

ROLES = ("language_model", "visual_encoder", "image_generator")
HERE = {role: str(getattr(SHIPPED, role)) for role in ROLES}
READ = {role: HERE[role] for role in ROLES[:2]}
CONTEXTS = [["a red ring.", Image.new("RGB", (32, 32), "navy"), "it turns"], ["a green cross."]]


def on_generator(path: str) -> Gill:
    """Untrained heads that say which frozen models they belong to."""
    untold = tiny_gill(generator=path)
    sources = {**HERE, "image_generator": path}
    backbones = Backbones(
        **{role: resolve_backbone(role, where) for role, where in sources.items()}
    )
    record = CheckpointRecord(
        sizes=untold.heads.sizes,
        backbones=backbones.fingerprints,
        parameters={},
        step=1,
        metrics={},
    )
    return dataclasses.replace(untold, backbones=backbones, record=record)


@pytest.fixture(scope="module")
def gill() -> Gill:
    return on_generator(HERE["image_generator"])


@pytest.fixture(scope="module")
def folder(gill, tmp_path_factory):
    return str(gill.save_pretrained(tmp_path_factory.mktemp("hub") / "my-gill"))


@pytest.fixture
def trusted_code(tmp_path, monkeypatch):
    # Where diffusers puts the code that it was told to trust.
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def pipe(folder, trusted_code):
    return custom_pipeline(HERE["image_generator"], folder)


def custom_pipeline(generator: str, folder: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(
        generator,
        dtype=torch.float32,
        custom_pipeline=folder,
        gill=folder,
        gill_backbones=READ,
        trust_remote_code=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def pixels(pictures):
    return [np.asarray(picture) for picture in pictures]


def test_its_pictures_are_ours(gill, pipe):
    assert_pictures_are_ours(gill, pipe)


def test_its_pictures_are_ours_on_xl(tmp_path, trusted_code):
    generator = str(stable_diffusion_xl(tmp_path / "xl"))
    gill = on_generator(generator)
    pipe = custom_pipeline(generator, str(gill.save_pretrained(tmp_path / "my-gill")))
    assert type(pipe).__name__ == "GillXLPipeline"
    assert_pictures_are_ours(gill, pipe)


def assert_pictures_are_ours(gill, pipe):
    hidden = read_contexts(gill.model, gill.encoder, CONTEXTS)
    ours = generate_pictures(
        gill.generator, gill.model.conditioning(hidden), gill.empty_prompt, FEW, 7
    )
    theirs = pipe(CONTEXTS, generator=seeded(7, 8)).images  # steps and guidance as saved
    np.testing.assert_array_equal(pixels(theirs), pixels(ours))
    alone = pipe(CONTEXTS[0], generator=seeded(7)).images
    np.testing.assert_array_equal(pixels(alone), pixels(ours[:1]))
    assert provenance_of(alone[0]).seed == 7


def test_what_diffusers_offers_works_on_it(pipe, tmp_path):
    def draw(**how):
        return pixels(pipe("a red ring.", generator=seeded(3), **how).images)[0]

    before = draw()
    assert not np.array_equal(draw(negative_prompt="a blue cross."), before)
    assert draw(num_inference_steps=2).shape == before.shape
    own = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    assert not np.array_equal(draw(), before)
    pipe.scheduler = own
    np.testing.assert_array_equal(draw(), before)
    # For another pipeline on the same generator.
    plain = DiffusionPipeline.from_pretrained(HERE["image_generator"], dtype=torch.float32)
    embeds = pipe.encode_contexts(["a red ring."])
    elsewhere = plain(**embeds, generator=seeded(3), num_inference_steps=3, guidance_scale=2.5)
    np.testing.assert_array_equal(pixels(elsewhere.images)[0], before)


def test_a_lora_and_its_file_change_its_pictures_and_are_taken_off(pipe, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRAs of diffusers need peft")

    def draw():
        return pixels(pipe("a red ring.", generator=seeded(3)).images)[0]

    before = draw()
    # A file without alphas is read as alpha = r.
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False
    )
    pipe.unet.add_adapter(config, "style")
    styled = draw()
    assert not np.array_equal(styled, before)
    layers = peft.get_peft_model_state_dict(pipe.unet, adapter_name="style")
    pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    pipe.unet.delete_adapters("style")
    np.testing.assert_array_equal(draw(), before)
    pipe.load_lora_weights(tmp_path / "lora")
    np.testing.assert_array_equal(draw(), styled)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(draw(), before)


def test_what_does_not_fit_is_said(pipe, folder):
    with pytest.raises(GillError, match="they stand where the prompt would"):
        pipe(["a"], prompt="a")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(HERE["image_generator"], custom_pipeline=folder)
    options = {"custom_pipeline": folder, "trust_remote_code": True}
    untold = DiffusionPipeline.from_pretrained(HERE["image_generator"], **options)
    with pytest.raises(GillError, match=r"gill=\.\.\.\): a folder or repository"):
        untold(["a"])
    alone = DiffusionPipeline.from_pretrained(HERE["image_generator"], gill=folder, **options)
    with pytest.raises(HubError, match="language model was a local directory"):
        alone(["a"])
