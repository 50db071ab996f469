"""The denoising loss beside diffusers' own training step, written plainly, in each family."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.checkpoint import LAST, STATE, load_state
from pipeline.bridge.denoising import draw_seeds
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws, training_losses
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.denoiser import load_denoiser
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.latent_encoder import latent_shape, load_latent_encoder
from pipeline.frozen.text_conditioner import load_text_conditioner
from pipeline.settings import MapperSizes, Objective
from pipeline.training.accumulation import backpropagate
from pipeline.training.loop import train
from tests.test_training import SETTINGS, random_batch
from tests.tiny_language_models import tiny_model, tiny_tokenizer

ALONE = Objective(
    captioning_weight=0,
    image_token_weight=0,
    retrieval_weight=0,
    generation_weight=0,
    diffusion_weight=1,
)
FAMILIES = {
    "1.x": tiny_models.stable_diffusion,
    "2.x": tiny_models.stable_diffusion_2,
    "xl": tiny_models.stable_diffusion_xl,
}
SEEDS = [7, 11, 2**61, 5]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(FAMILIES[request.param](tmp_path_factory.mktemp("pipeline")))


conditioner_of = functools.cache(load_text_conditioner)


def gill_for(source: str, **denoiser: Any) -> MultimodalLanguageModel:
    conditioner = conditioner_of(source)
    language_model = LanguageModel(tiny_model("opt", torch.float32), tiny_tokenizer())
    sizes = HeadSizes(
        d=6,
        e=language_model.width,
        k=2,
        r=3,
        L=conditioner.length,
        D=conditioner.width,
        D_pooled=conditioner.pooled_width,
        m=8,
        p=4,
        mapper=MapperSizes(encoder_layers=1, decoder_layers=1),
    )
    torch.manual_seed(1)
    gill = MultimodalLanguageModel(language_model, Heads(sizes))
    gill.denoiser = load_denoiser(source, **denoiser)
    return gill


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The family with the most inputs, for what no other can change."""
    return str(tiny_models.stable_diffusion_xl(tmp_path_factory.mktemp("xl")))


def batch_for(gill: MultimodalLanguageModel, source: str, position: int = 3) -> CaptionBatch:
    batch, sizes = random_batch(position), gill.heads.sizes
    g = torch.Generator().manual_seed(position)
    posterior = torch.randn(len(batch), *latent_shape(source), generator=g)
    posterior[:, 1] = 0.3 * posterior[:, 1].abs()
    return replace(
        batch,
        targets=torch.randn(len(batch), sizes.L, sizes.D, generator=g),
        pooled_targets=sizes.D_pooled and torch.randn(len(batch), sizes.D_pooled, generator=g),
        posterior=posterior,
    )


def draws_of(num: int, seeds: list[int] | None = SEEDS) -> PackingDraws:
    return replace(PackingDraws.same(num, packed=False), noise=seeds)


def plain_loss(
    gill: MultimodalLanguageModel, batch: CaptionBatch, source: str, dropout: float = 0.0
) -> torch.Tensor:
    """The step of diffusers' `train_text_to_image(_sdxl).py`, line by line, on one posterior."""
    pipeline = DiffusionPipeline.from_pretrained(source)
    unet, vae = pipeline.unet.requires_grad_(False).eval(), pipeline.vae
    noise_scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
    tokens = gill.image_tokens(batch, [(i,) for i in range(len(batch))], False, False)
    prompt_embeds = gill.generation_embedding(tokens.hidden)
    pooled = None
    if hasattr(pipeline, "text_encoder_2"):
        pooled = gill.generation_pooled(tokens.hidden)
    samples, noises, timesteps = [], [], []
    for i, seed in enumerate(SEEDS):
        g = torch.Generator().manual_seed(seed)
        timesteps.append(
            torch.randint(0, noise_scheduler.config.num_train_timesteps, (), generator=g)
        )
        if float(torch.rand((), generator=g)) < dropout:
            negative = pipeline.encode_prompt("", device="cpu", num_images_per_prompt=1,
                                              do_classifier_free_guidance=True)  # fmt: skip
            prompt_embeds = prompt_embeds.clone()
            prompt_embeds[i] = negative[1][0]
            if pooled is not None:
                pooled = pooled.clone()
                pooled[i] = negative[3][0]
        samples.append(torch.randn(latent_shape(source)[1:], generator=g))
        noises.append(torch.randn(latent_shape(source)[1:], generator=g))
    latents = batch.posterior[:, 0] + batch.posterior[:, 1] * torch.stack(samples)
    latents = latents * vae.config.scaling_factor
    noise, timesteps = torch.stack(noises), torch.stack(timesteps).long()
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    elif noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = latents
    added = {}
    if pooled is not None:
        # original size, crop, target size: pictures of 16 x 16
        add_time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(batch))
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": add_time_ids}}
    model_pred = unet(noisy_latents, timesteps, prompt_embeds, return_dict=False, **added)[0]
    return F.mse_loss(model_pred.float(), target.float(), reduction="mean")


def gradients(gill: MultimodalLanguageModel) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in gill.heads.named_parameters() if p.grad is not None}
    gill.heads.zero_grad(set_to_none=True)
    return found


def assert_alike(ours: dict, theirs: dict, rel: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    norm = torch.cat([g.flatten() for g in theirs.values()]).norm()
    assert float(norm) > 0
    for name, gradient in theirs.items():
        # Of a tensor whose gradient is all rounding (the bias of keys) nothing relative holds.
        scale = max(float(gradient.norm()), 1e-3 * float(norm))
        assert float((ours[name] - gradient).norm()) <= rel * scale, name


def test_loss_and_gradients_are_those_of_diffusers(source: str) -> None:
    check_beside_diffusers(source, 0.0)


def test_dropped_conditions_are_the_empty_prompts(xl: str) -> None:
    """Of three of the four seeds the draw is below a half."""
    check_beside_diffusers(xl, 0.5)


def check_beside_diffusers(source: str, dropout: float) -> None:
    empty = conditioner_of(source).unconditional()
    gill = gill_for(source, empty=empty)
    batch = batch_for(gill, source)
    theirs = plain_loss(gill, batch, source, dropout)
    theirs.backward()
    expected = gradients(gill)
    objective = ALONE.model_copy(update={"condition_dropout": dropout})
    ours = training_losses(gill, batch, objective, draws_of(4))
    assert ours.total.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert ours.diffusion.item() == ours.total.item()
    ours.total.backward()
    assert_alike(gradients(gill), expected)
    # E_img, the mapper and, for XL, the pooled projection: nothing else, and nothing frozen.
    names = {name.partition(".")[0] for name in expected}
    pooled = {"pooled_projection"} if gill.heads.pooled_projection is not None else set()
    assert names == {"image_embeddings", "mapper"} | pooled


def test_every_prediction_type(tmp_path: Path) -> None:
    """The same UNet taken for one that predicts the latents; what is none of the three."""
    source = str(tiny_models.stable_diffusion(tmp_path))
    config = tmp_path / "scheduler/scheduler_config.json"
    text = config.read_text()
    for kind in ("sample", "v_prediction"):
        config.write_text(
            text.replace('"prediction_type": "epsilon"', f'"prediction_type": "{kind}"')
        )
        gill = gill_for(source)
        batch = batch_for(gill, source)
        ours = training_losses(gill, batch, ALONE, draws_of(4)).total
        assert float(ours) == pytest.approx(float(plain_loss(gill, batch, source)), rel=1e-6)
    config.write_text(text.replace('"prediction_type": "epsilon"', '"prediction_type": "flow"'))
    with pytest.raises(BackboneError, match="predicts flow: its denoising loss is known for"):
        load_denoiser(source)


def test_it_is_added_to_the_regression_with_its_weight(xl: str) -> None:
    gill = gill_for(xl)
    batch = batch_for(gill, xl)
    whole = training_losses(gill, batch, Objective(diffusion_weight=0.25), draws_of(4))
    without = training_losses(gill, batch, Objective(), draws_of(4))
    alone = training_losses(gill, batch, ALONE, draws_of(4))
    assert without.diffusion is None
    torch.testing.assert_close(whole.diffusion, alone.total)
    torch.testing.assert_close(whole.total, without.total + 0.25 * alone.total)
    for part in ("captioning", "image_token", "generation", "pooled", "text_to_image"):
        assert torch.equal(getattr(whole, part), getattr(without, part)), part


def test_parts_and_recomputation_give_the_step_of_the_whole_batch(xl: str) -> None:
    gill = gill_for(xl)
    batch, objective = batch_for(gill, xl), Objective(diffusion_weight=0.5)
    losses = backpropagate(gill, batch, objective, draws_of(4))
    expected = gradients(gill)
    in_parts = backpropagate(gill, batch, objective, draws_of(4), micro_batch_size=2)
    torch.testing.assert_close(in_parts.diffusion, losses.diffusion)
    assert_alike(gradients(gill), expected)

    calls: list[bool] = []
    unet = gill.denoiser._unet
    unet.up_blocks[-1].resnets[0].register_forward_pre_hook(lambda *_: calls.append(unet.training))
    gill.denoiser.recompute_activations()
    again = backpropagate(gill, batch, objective, draws_of(4))
    assert torch.equal(again.total, losses.total)
    assert calls == [False, False]  # forward, and once more for the backward pass; in eval()
    for name, gradient in gradients(gill).items():
        assert torch.equal(gradient, expected[name]), name


def test_what_is_drawn_is_an_examples_own(xl: str) -> None:
    """Not its place's in the batch; where nothing is drawn, as in validation, its row's."""
    gill = gill_for(xl)
    batch = batch_for(gill, xl)
    rows = batch.rows.tolist()
    by_row = training_losses(gill, batch, ALONE, draws_of(4, None)).total
    assert torch.equal(by_row, training_losses(gill, batch, ALONE, draws_of(4, rows)).total)
    other = training_losses(gill, batch, ALONE, draws_of(4, rows[::-1])).total
    assert not torch.equal(by_row, other)
    assert draws_of(4).part(2, 4).noise == SEEDS[2:]


class Batches:
    """Batches with latents, by their position."""

    def __init__(self, gill: MultimodalLanguageModel, source: str, last: int | None = None) -> None:
        self.gill, self.source, self.last, self.position = gill, source, last, 0

    def __iter__(self) -> Iterator[CaptionBatch]:
        while True:
            if self.position == self.last:
                raise KeyboardInterrupt
            self.position += 1
            yield batch_for(self.gill, self.source, self.position)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


SHORT = SETTINGS.model_copy(update={"steps": 4})


def run(
    folder: Path, source: str, objective: Objective, last: int | None = None, **how: Any
) -> Any:
    gill = gill_for(source)
    held_out = [batch_for(gill, source, 900)]
    return train(
        gill, Batches(gill, source, last), objective, SHORT, directory=folder,
        validation=held_out, **how,
    )  # fmt: skip


def test_a_run_that_was_stopped_goes_on_bit_by_bit(tmp_path: Path) -> None:
    source = str(tiny_models.stable_diffusion_2(tmp_path / "sd2"))
    objective = Objective(diffusion_weight=1.0)
    whole = run(tmp_path / "whole", source, objective)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", source, objective, last=3)
    resumed = run(tmp_path / "cut", source, objective, resume=True)
    assert resumed.curve == whole.curve
    for name in (LAST, STATE):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    seen = [row["train/diffusion"] for row in whole.curve if "train/diffusion" in row]
    assert len(set(seen)) == len(seen) == SHORT.steps
    assert "validation/diffusion" in whole.metrics
    assert load_state(tmp_path / "whole" / STATE).generators.keys() == {"coins", "torch", "noise"}


def test_without_a_weight_nothing_is_another(tmp_path: Path) -> None:
    """No column, no generator, no key: states and checkpoints are those from before."""
    source = str(tiny_models.stable_diffusion(tmp_path / "sd"))
    result = run(tmp_path / "run", source, Objective())
    assert not any("diffusion" in name for row in result.curve for name in row)
    state = load_state(tmp_path / "run" / STATE)
    assert state.generators.keys() == {"coins", "torch"}
    written = state.record.parameters["objective"]
    assert not {"diffusion_weight", "condition_dropout"} & written.keys()
    assert Objective(**written) == Objective()
    asked = Objective(diffusion_weight=0.5).model_dump(mode="json")
    assert (asked["diffusion_weight"], asked["condition_dropout"]) == (0.5, 0.0)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    source = str(tiny_models.stable_diffusion(tmp_path))
    gill = gill_for(source)
    batch = batch_for(gill, source)
    with pytest.raises(InputError, match="there is no latents in the batch"):
        training_losses(gill, replace(batch, posterior=None), ALONE, draws_of(4))
    dropping = ALONE.model_copy(update={"condition_dropout": 0.1})
    with pytest.raises(InputError, match="needs the empty prompt's conditioning"):
        training_losses(gill, batch, dropping, draws_of(4))
    gill.denoiser = None
    with pytest.raises(InputError, match="there is no UNet"):
        training_losses(gill, batch, ALONE, draws_of(4))
    with pytest.raises(InputError, match="in float16, in which gradients underflow"):
        load_denoiser(source, dtype=torch.float16)
    with pytest.raises(BackboneError, match="cannot load the UNet of"):
        load_denoiser(str(tmp_path / "nowhere"))


def test_seeds_are_the_generators() -> None:
    ours = draw_seeds(4, torch.Generator().manual_seed(1))
    assert ours == draw_seeds(4, torch.Generator().manual_seed(1))
    assert len(set(ours)) == 4
    assert all(0 <= seed < 2**62 for seed in ours)


def test_latents_are_the_autoencoders(xl: str) -> None:
    """Of pictures that are no squares the middle, as diffusers' own processor cuts it."""
    pipeline = DiffusionPipeline.from_pretrained(xl)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in ((16, 16), (16, 24))
    ]
    encoder = load_latent_encoder(xl)
    ours = encoder.encode([encoder.preprocess(picture) for picture in pictures])
    assert tuple(ours.shape[1:]) == latent_shape(xl) == (2, 4, 8, 8)
    for picture, (mean, deviation) in zip(pictures, ours):
        cut = picture.crop(((picture.width - 16) // 2, 0, (picture.width + 16) // 2, 16))
        pixels = pipeline.image_processor.preprocess(cut)
        posterior = pipeline.vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, posterior.mean[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(deviation, posterior.std[0], rtol=1e-5, atol=1e-6)
