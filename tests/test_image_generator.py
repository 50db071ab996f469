"""The generator's two sides agree with the whole diffusers pipeline."""

from functools import partial

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import PreTrainedModel

from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.image_generator import load_image_generator
from pipeline.frozen.text_conditioner import load_text_conditioner
from pipeline.settings import GenerationSettings

SETTINGS = GenerationSettings(steps=3, guidance=3.0, scheduler="ddim", batch_size=2)
MAKERS = {
    "sd": tiny_models.stable_diffusion,
    "sd 2": tiny_models.stable_diffusion_2,
    "xl": tiny_models.stable_diffusion_xl,
    "xl, empty prompt": partial(tiny_models.stable_diffusion_xl, zeros=False),
}


@pytest.fixture(scope="module", params=MAKERS)
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
    whole_prompt, longer = "a b c " * 40, "a b c " * 40 + "d"
    assert conditioner.read(whole_prompt) == conditioner.read(longer) != conditioner.read("a b")
    same = conditioner.encode([whole_prompt, longer]).embedding
    assert same[0].equal(same[1]), "what is read alike is encoded alike"
    assert conditioner.read("a b") != conditioner.read("a c")
    if len(expected) == 4:
        torch.testing.assert_close(ours.pooled, expected[2], atol=1e-6, rtol=0)
        assert conditioner.pooled_width == 20
    else:
        assert ours.pooled is None


def test_pictures_from_conditioning_equal_pictures_from_text(directory):
    conditioner = load_text_conditioner(str(directory))
    generator = load_image_generator(str(directory))
    prompts, empty = conditioner.encode(["a b", "c", "d e f"]), conditioner.unconditional()
    ours = generator.generate(prompts, empty, seeds=[1, 2, 3], settings=SETTINGS)
    whole = DiffusionPipeline.from_pretrained(directory)
    whole.scheduler = type(generator._pipeline.scheduler).from_config(
        generator._pipeline.scheduler.config
    )
    # As they come: no negative prompt, for which XL takes zeros and the others the empty prompt.
    expected = whole(
        ["a b", "c"],
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
    with pytest.raises(BackboneError, match="D, the text width, is 24 .* takes 16"):
        generator.generate(wrong, wrong, seeds=[0], settings=SETTINGS)
    pooled = Conditioning(torch.zeros(1, 12, 16), torch.zeros(1, 20))
    with pytest.raises(BackboneError, match="D_pooled.* is 20 .* takes none"):
        generator.generate(pooled, pooled, seeds=[0], settings=SETTINGS)


def test_xl_wants_its_pooled_vector(tmp_path):
    generator = load_image_generator(str(tiny_models.stable_diffusion_xl(tmp_path)))
    assert (generator.width, generator.pooled_width) == (40, 20)
    without = Conditioning(torch.zeros(1, 12, 40))
    with pytest.raises(BackboneError, match="D_pooled.* is absent .* takes 20"):
        generator.generate(without, without, seeds=[0], settings=SETTINGS)


def test_ddim_does_not_clip_latents(directory):
    """diffusers' DDIM clips to [-1, 1] unless told otherwise, which spoils latents."""
    generator = load_image_generator(str(directory))
    assert generator._scheduler("ddim").config.clip_sample is False
    assert generator._scheduler("pipeline") is generator._own_scheduler


def test_each_side_loads_its_own_parts_alone(directory, monkeypatch):
    """A stage that encodes text holds no UNet, one that makes pictures no text encoder."""
    read = []
    for kind in (UNet2DConditionModel, AutoencoderKL, PreTrainedModel):
        real = kind.from_pretrained.__func__

        def watched(cls, *args, _real=real, **kwargs):
            read.append(cls.__name__)
            return _real(cls, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(watched))
    text = load_text_conditioner(str(directory))
    encoders = ["CLIPTextModel", "CLIPTextModelWithProjection"]
    assert sorted(read) == encoders[: 1 if text.pooled_width is None else 2]
    assert text._pipeline.unet is None
    assert text._pipeline.vae is None
    read.clear()
    image = load_image_generator(str(directory))
    assert sorted(read) == ["AutoencoderKL", "UNet2DConditionModel"]
    assert image._pipeline.text_encoder is None
    assert image._pipeline.tokenizer is None


def test_saving_memory_changes_nothing_but_rounding(directory):
    conditioner = load_text_conditioner(str(directory))
    generator = load_image_generator(str(directory))
    prompts, empty = conditioner.encode(["a b", "c"]), conditioner.unconditional()

    def make(**changes):
        settings = SETTINGS.model_copy(update=changes)
        made = generator.generate(prompts, empty, seeds=[1, 2], settings=settings)
        return np.stack([np.asarray(picture, int) for picture in made])

    plain = make()
    sliced = make(attention_slicing=True, vae_slicing=True, vae_tiling=True)
    kinds = {type(p).__name__ for p in generator._pipeline.unet.attn_processors.values()}
    assert kinds == {"SlicedAttnProcessor"}
    assert generator._pipeline.vae.use_slicing
    assert generator._pipeline.vae.use_tiling
    assert np.abs(sliced - plain).max() <= 1
    # Without a GPU there is nothing to offload.
    np.testing.assert_array_equal(make(cpu_offload="model"), plain)
    assert not generator._pipeline.vae.use_slicing
    assert not generator._pipeline.vae.use_tiling


def test_the_format_of_convolutions_changes_nothing_but_rounding(directory, monkeypatch):
    conditioner = load_text_conditioner(str(directory))
    generator = load_image_generator(str(directory))
    prompts, empty = conditioner.encode(["a b", "c"]), conditioner.unconditional()
    unet = generator._pipeline.unet

    def make(convolutions):
        settings = SETTINGS.model_copy(update={"convolutions": convolutions})
        made = generator.generate(prompts, empty, seeds=[1, 2], settings=settings)
        return np.stack([np.asarray(picture, int) for picture in made])

    plain = make("plain")
    assert unet.conv_in.weight.is_contiguous()
    for convolutions in ("channels_last", "compiled"):  # compiled on a GPU alone
        assert np.abs(make(convolutions) - plain).max() <= 1
        assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert unet._compiled_call_impl is None
    np.testing.assert_array_equal(make("plain"), plain)
    assert unet.conv_in.weight.is_contiguous()
    # On a GPU; here the call alone is seen.
    asked = []
    monkeypatch.setattr(type(unet), "compile", lambda self, **how: asked.append(how))
    generator._device = torch.device("cuda")
    generator._lay_out("compiled")
    assert asked == [{"dynamic": False}]


def test_offloading_is_diffusers_own_and_follows_the_settings(tmp_path, monkeypatch):
    """On a GPU; here the calls alone are seen."""
    folder = tiny_models.stable_diffusion(tmp_path)
    generator = load_image_generator(str(folder), device="cuda:1")
    asked, kind = [], type(generator._pipeline)
    for name in ("to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(
            kind, name, lambda *args, _name=name, **kwargs: asked.append((_name, args[1:], kwargs))
        )
    device = torch.device("cuda:1")
    for offload in ("none", "none", "model", "sequential", "none"):
        generator._place(SETTINGS.model_copy(update={"cpu_offload": offload}))
    assert asked == [
        ("to", (device,), {}),
        ("enable_model_cpu_offload", (), {"device": device}),
        ("enable_sequential_cpu_offload", (), {"device": device}),
        ("to", (device,), {}),
    ]


def test_previews_of_xl_in_float16_are_decoded_in_float32(tmp_path, monkeypatch):
    folder = tiny_models.stable_diffusion_xl(tmp_path)
    generator = load_image_generator(str(folder), dtype=torch.float16)
    vae, seen = generator._pipeline.vae, []
    assert vae.config.force_upcast
    real = vae.decode
    monkeypatch.setattr(vae, "decode", lambda x: (seen.append(x.dtype), real(x))[1])
    with torch.no_grad():
        [picture] = generator._decode(torch.randn(1, 4, 8, 8, dtype=torch.float16))
    assert seen == [torch.float32]
    assert picture.size == (16, 16)
    assert vae.dtype == torch.float16


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
