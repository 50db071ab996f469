"""The generator's two sides agree with the whole diffusers pipeline."""

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline

from pipeline.backbones import BackboneError
from pipeline.image_generator import load_image_generator
from pipeline.settings import GenerationSettings
from pipeline.text_conditioner import Conditioning, load_text_conditioner

SETTINGS = GenerationSettings(steps=3, guidance=3.0, scheduler="ddim", batch_size=2)
MAKERS = {"sd": tiny_models.stable_diffusion, "xl": tiny_models.stable_diffusion_xl}


@pytest.fixture(scope="module", params=["sd", "xl"])
def directory(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


def test_text_conditioning_is_the_pipelines_own(directory):
    conditioner = load_text_conditioner(str(directory))
    whole = DiffusionPipeline.from_pretrained(directory)
    expected = whole.encode_prompt(
        ["a b", "c"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    ours = conditioner.encode(["a b", "c"])
    torch.testing.assert_close(ours.embedding, expected[0], atol=1e-6, rtol=0)
    assert (conditioner.length, conditioner.width) == tuple(expected[0].shape[1:])
    if len(expected) == 4:
        torch.testing.assert_close(ours.pooled, expected[2], atol=1e-6, rtol=0)
        assert conditioner.pooled_width == 20
    else:
        assert ours.pooled is None


def test_pictures_from_conditioning_equal_pictures_from_text(directory):
    conditioner = load_text_conditioner(str(directory))
    generator = load_image_generator(str(directory))
    prompts, empty = conditioner.encode(["a b", "c", "d e f"]), conditioner.encode([""])
    ours = generator.generate(prompts, empty, seeds=[1, 2, 3], settings=SETTINGS)
    whole = DiffusionPipeline.from_pretrained(directory)
    whole.scheduler = type(generator._pipeline.scheduler).from_config(
        generator._pipeline.scheduler.config
    )
    # XL replaces an absent negative prompt by zeros unless it is given: both sides say "".
    expected = whole(
        ["a b", "c"],
        negative_prompt=["", ""],
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(s) for s in (1, 2)],
    ).images
    for mine, theirs in zip(ours[:2], expected, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    assert len(ours) == 3


def test_a_picture_depends_on_its_seed_not_on_its_batch(directory):
    conditioner = load_text_conditioner(str(directory))
    generator = load_image_generator(str(directory))
    prompts, empty = conditioner.encode(["a", "b", "c"]), conditioner.encode([""])
    together = generator.generate(prompts, empty, seeds=[5, 6, 7], settings=SETTINGS)
    pooled = None if prompts.pooled is None else prompts.pooled[2:]
    alone = generator.generate(
        Conditioning(prompts.embedding[2:], pooled), empty, seeds=[7], settings=SETTINGS
    )
    difference = np.abs(np.asarray(together[2], int) - np.asarray(alone[0], int))
    assert difference.max() <= 1
    assert np.any(np.asarray(together[0]) != np.asarray(together[1]))


def test_a_wrong_width_is_refused_by_name(tmp_path):
    generator = load_image_generator(str(tiny_models.stable_diffusion(tmp_path)))
    wrong = Conditioning(torch.zeros(1, 12, 24))
    with pytest.raises(BackboneError, match="24 wide.*takes 16"):
        generator.generate(wrong, wrong, seeds=[0], settings=SETTINGS)


def test_ddim_does_not_clip_latents(directory):
    """diffusers' DDIM clips to [-1, 1] unless told otherwise, which spoils latents."""
    generator = load_image_generator(str(directory))
    assert generator._scheduler("ddim").config.clip_sample is False
    assert generator._scheduler("pipeline") is generator._own_scheduler


def test_previews_show_the_picture_on_its_way_and_change_nothing(directory):
    conditioner = load_text_conditioner(str(directory))
    generator = load_image_generator(str(directory))
    prompts, empty = conditioner.encode(["a", "b"]), conditioner.encode([""])
    heard = []

    def listen(done, total, previews):
        heard.append((done, total, previews))

    settings = SETTINGS.model_copy(update={"steps": 4, "preview_every": 2})
    watched = generator.generate(prompts, empty, seeds=[1, 2], settings=settings, on_step=listen)
    plain = generator.generate(
        prompts, empty, seeds=[1, 2], settings=settings.model_copy(update={"preview_every": 0})
    )
    assert [(done, total, previews is None) for done, total, previews in heard] == [
        (1, 4, True),
        (2, 4, False),
        (3, 4, True),
        (4, 4, True),
    ]
    previews = heard[1][2]
    assert [picture.size for picture in previews] == [(16, 16), (16, 16)]
    for mine, theirs, preview in zip(watched, plain, previews, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
        assert np.any(np.asarray(mine) != np.asarray(preview))
