"""The fast step against the plain formulation, over architectures, packings, lengths and dtypes."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws, draw_packing, training_losses
from pipeline.frozen.language_model import LanguageModel
from pipeline.settings import MapperSizes, Objective
from tests.plain import Plain
from tests.tiny_language_models import CONFIGURATIONS, NUM_WORDS, tiny_model, tiny_tokenizer

PARTS = ("captioning", "image_token", "text_to_image", "image_to_text", "generation", "total")
PRESETS = {"paper": Objective.paper(), "released": Objective.released()}
MAX_TOKENS = 23


def small_sizes(e: int, r: int, adds_embedding: bool) -> HeadSizes:
    mapper = MapperSizes(
        encoder_layers=1, decoder_layers=2, feedforward=2, adds_embedding=adds_embedding
    )
    return HeadSizes(d=10, e=e, k=3, r=r, L=7, D=12, m=16, p=8, mapper=mapper)


def example_batch(lengths: list[int], dtype: torch.dtype, seed: int = 0) -> CaptionBatch:
    generator = torch.Generator().manual_seed(seed)
    captions = [torch.randint(3, NUM_WORDS, (n,), generator=generator).tolist() for n in lengths]
    pooled = torch.randn(len(lengths), 10, generator=generator, dtype=torch.float64)
    targets = torch.randn(len(lengths), 7, 12, generator=generator, dtype=torch.float64)
    rows = torch.arange(len(lengths))
    return CaptionBatch.from_lists(captions, pooled.to(dtype), targets.to(dtype), rows, MAX_TOKENS)


def captions_of(batch: CaptionBatch) -> list[list[int]]:
    return [part.tolist() for part in batch.tokens.split(batch.lengths)]


def build(
    name: str, r: int, objective: Objective, dtype: torch.dtype, start: bool = True
) -> tuple[MultimodalLanguageModel, Plain]:
    model = tiny_model(name, dtype)
    torch.manual_seed(1)
    heads = Heads(
        small_sizes(
            model.get_input_embeddings().weight.shape[1], r, objective.token_reduction == "tokens"
        )
    ).to(dtype)
    with torch.no_grad():
        heads.image_embeddings.normal_(0, 0.3)
    language_model = LanguageModel(copy.deepcopy(model), tiny_tokenizer(start))
    plain = Plain(model, heads, language_model.num_rows, language_model.start_ids)
    return MultimodalLanguageModel(language_model, heads), plain


def relative_gradient_errors(ours: dict, plain: dict) -> dict[str, float]:
    """Relative L2 per parameter; a gradient that is zero but for rounding counts against all."""
    assert ours.keys() == plain.keys()
    overall = torch.stack([g.norm() for g in plain.values()]).norm()
    return {
        name: float((ours[name] - g).norm() / torch.maximum(g.norm(), 1e-4 * overall))
        for name, g in plain.items()
    }


def compare(
    gill: MultimodalLanguageModel,
    plain: Plain,
    batch: CaptionBatch,
    objective: Objective,
    draws: PackingDraws,
    loss_tolerance: float,
    gradient_tolerance: float,
) -> None:
    expected = plain.losses(captions_of(batch), batch.pooled, batch.targets, objective, draws)
    losses = training_losses(gill, batch, objective, draws)
    for part in PARTS:
        ours, theirs = getattr(losses, part).item(), expected[part].item()
        assert ours == pytest.approx(theirs, rel=loss_tolerance), part
    gill.zero_grad()
    plain.zero_grad()
    losses.total.backward()
    expected["total"].backward()
    ours = {n: p.grad for n, p in gill.heads.named_parameters() if p.grad is not None}
    errors = relative_gradient_errors(ours, plain.gradients())
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < gradient_tolerance, (worst, errors[worst])


PAIR = PackingDraws.same(2, False)
LENGTHS = [1, MAX_TOKENS, 5, 1, MAX_TOKENS, 11]
DRAWS = {
    "alone": PackingDraws.same(6, False),
    "packed": PackingDraws.same(6, True),
    "mixed": PackingDraws([True, False, True], [False, True, True], [False, True, True]),
    "drawn-apart": PackingDraws([False, False, True], [True, False, False], [True, True, False]),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("r", range(1, 9))
def test_equals_the_plain_step_in_float64(preset: str, r: int) -> None:
    objective = PRESETS[preset]
    gill, plain = build("opt", r, objective, torch.float64)
    batch = example_batch(LENGTHS, torch.float64)
    for draws in DRAWS.values():
        compare(gill, plain, batch, objective, draws, 1e-12, 1e-9)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["opt", "opt-post-norm-projected"])
def test_equals_the_plain_step_in_float32(preset: str, name: str) -> None:
    objective = PRESETS[preset]
    gill, plain = build(name, 4, objective, torch.float32)
    batch = example_batch(LENGTHS, torch.float32)
    for draws in DRAWS.values():
        compare(gill, plain, batch, objective, draws, 1e-6, 1e-3)


# Norms of Llama's kind compute in float32 whatever the model's dtype.
FLOAT32_INSIDE = {
    "llama-untied-grouped",
    "llama-3-rope",
    "qwen2-tied",
    "qwen3-untied",
    "mistral-window",
}


@pytest.mark.parametrize("name", [n for n in CONFIGURATIONS if n != "opt"])
def test_serves_every_architecture(name: str) -> None:
    objective = Objective.released()
    gill, plain = build(name, 3, objective, torch.float64)
    batch = example_batch(LENGTHS, torch.float64)
    tolerances = (1e-6, 1e-5) if name in FLOAT32_INSIDE else (1e-12, 1e-9)
    for draws in (DRAWS["alone"], DRAWS["mixed"]):
        compare(gill, plain, batch, objective, draws, *tolerances)


@pytest.mark.parametrize("preset", PRESETS)
def test_serves_a_model_without_start_ids(preset: str) -> None:
    objective = PRESETS[preset]
    gill, plain = build("gpt2", 2, objective, torch.float64, start=False)
    assert gill.language_model.start_ids == []
    batch = example_batch(LENGTHS, torch.float64)
    for draws in (DRAWS["alone"], DRAWS["mixed"]):
        compare(gill, plain, batch, objective, draws, 1e-12, 1e-9)


SWITCHES = {
    "supervise_start": [False, True],
    "captioning_softmax": ["words", "words_and_images"],
    "image_token_targets": ["image_token", "caption_and_image_token"],
    "supervise_second": [False, True],
    "token_reduction": ["examples", "tokens"],
    "generation_loss": ["squared_error", "distance"],
}


@pytest.fixture(scope="module")
def opt64() -> tuple[MultimodalLanguageModel, Plain]:
    return build("opt", 2, Objective.paper(), torch.float64)


def test_every_combination_of_switches(opt64: tuple[MultimodalLanguageModel, Plain]) -> None:
    batch = example_batch([2, 5, 1], torch.float64)
    draws = PackingDraws.same(3, True)
    for values in itertools.product(*SWITCHES.values()):
        objective = Objective(**dict(zip(SWITCHES, values)))
        compare(*opt64, batch, objective, draws, 1e-12, 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, MAX_TOKENS + 4), min_size=1, max_size=5),
    coins=st.lists(st.booleans(), min_size=6, max_size=6),
    preset=st.sampled_from(["paper", "second", "captions"]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_plain_step_on_any_ragged_batch(
    opt64: tuple[MultimodalLanguageModel, Plain],
    lengths: list[int],
    coins: list[bool],
    preset: str,
    seed: int,
) -> None:
    objective = {
        "paper": Objective.paper(),
        "second": Objective(supervise_second=False, token_reduction="tokens"),
        "captions": Objective(
            image_token_targets="caption_and_image_token", captioning_softmax="words_and_images"
        ),
    }[preset]
    pairs = len(lengths) // 2
    draws = PackingDraws(coins[:pairs], coins[2 : 2 + pairs], coins[4 : 4 + pairs])
    batch = example_batch(lengths, torch.float64, seed)
    compare(*opt64, batch, objective, draws, 1e-12, 1e-9)


def test_bfloat16_stays_close_to_float32() -> None:
    """Frozen model and computation in bfloat16, masters in float32: losses to 2%, gradients to 8%.

    Eight bits of mantissa round at 0.4%; the bounds leave room for two layers and a mapper.
    """
    objective = Objective.released()
    exact, _ = build("opt", 4, objective, torch.float32)
    rounded_model = tiny_model("opt", torch.bfloat16)
    gill = MultimodalLanguageModel(
        LanguageModel(rounded_model, tiny_tokenizer()), copy.deepcopy(exact.heads)
    )
    batch = example_batch(LENGTHS, torch.float32)
    grads = []
    for model in (exact, gill):
        losses = training_losses(model, batch, objective, DRAWS["mixed"])
        losses.total.backward()
        grads.append({n: p.grad for n, p in model.heads.named_parameters()})
        grads[-1]["losses"] = torch.stack([getattr(losses, part) for part in PARTS]).detach()
    assert all(g.dtype == torch.float32 for g in grads[1].values())
    torch.testing.assert_close(grads[1].pop("losses"), grads[0].pop("losses"), rtol=0.02, atol=0)
    ours, theirs = (torch.cat([g.flatten() for g in grad.values()]) for grad in grads[::-1])
    assert float((ours - theirs).norm() / theirs.norm()) < 0.08


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_heads_may_be_kept_in_bfloat16(frozen: torch.dtype) -> None:
    objective = Objective.released()
    gill, _ = build("opt", 2, objective, torch.float32)
    exact = training_losses(gill, example_batch([3, 4], torch.float32), objective, PAIR)
    model = LanguageModel(tiny_model("opt", frozen), tiny_tokenizer())
    low = MultimodalLanguageModel(model, copy.deepcopy(gill.heads).to(torch.bfloat16))
    losses = training_losses(low, example_batch([3, 4], torch.float32), objective, PAIR)
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(exact.total.item(), rel=0.03)
    losses.total.backward()
    grads = [p.grad for p in low.heads.parameters()]
    assert {g.dtype for g in grads} == {torch.bfloat16}
    assert all(g.isfinite().all() for g in grads)


def test_tokens_of_another_tokenizer_are_refused(
    opt64: tuple[MultimodalLanguageModel, Plain],
) -> None:
    batch = example_batch([3, 4], torch.float64)
    batch.tokens[5] = NUM_WORDS + 1
    with pytest.raises(ValueError, match="holds token 51, but the frozen vocabulary ends at 50"):
        training_losses(opt64[0], batch, Objective.paper(), PAIR)


def test_float16_is_refused() -> None:
    heads = Heads(small_sizes(32, 2, False))
    gill = MultimodalLanguageModel(
        LanguageModel(tiny_model("opt", torch.float16), tiny_tokenizer()), heads
    )
    with pytest.raises(ValueError, match="float16, in which gradients underflow"):
        training_losses(gill, example_batch([3, 4], torch.float32), Objective.paper(), PAIR)


def test_weight_zero_leaves_a_part_out(opt64: tuple[MultimodalLanguageModel, Plain]) -> None:
    gill, _ = opt64
    batch = example_batch([3, 4], torch.float64)
    draws = PackingDraws.same(2, False)
    full = training_losses(gill, batch, Objective.paper(), draws)
    only = training_losses(
        gill, batch, Objective(retrieval_weight=0, captioning_weight=0, image_token_weight=0), draws
    )
    assert only.total.item() == only.generation.item() == full.generation.item()
    assert only.captioning.item() == only.text_to_image.item() == only.image_token.item() == 0
    alone = training_losses(
        gill, batch, Objective(retrieval_weight=0, captioning_weight=0, generation_weight=0), draws
    )
    assert alone.total.item() == full.image_token.item()


def test_fixed_temperature_has_no_gradient(opt64: tuple[MultimodalLanguageModel, Plain]) -> None:
    gill, _ = opt64
    gill.zero_grad()
    batch = example_batch([3, 4], torch.float64)
    objective = Objective(learn_temperature=False)
    training_losses(gill, batch, objective, PackingDraws.same(2, False)).total.backward()
    assert gill.heads.logit_scale.grad is None


def test_released_differs_from_paper_where_documented() -> None:
    paper, released = Objective.paper().model_dump(), Objective.released().model_dump()
    assert {name for name in paper if paper[name] != released[name]} == {
        "retrieval_weight",
        "token_reduction",
        "supervise_start",
        "captioning_softmax",
        "image_token_targets",
        "supervise_second",
        "generation_loss",
        "packing_unit",
        "rescale_image_rows",
    }


def test_coins_fall_per_pair_or_per_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    by_pair = [draw_packing(8, Objective.paper(), generator) for _ in range(200)]
    packed = torch.tensor([draw.captioning for draw in by_pair])
    assert packed.shape == (200, 4)
    assert packed.float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert 0 < packed.float().mean(1).std().item() < 0.35
    by_batch = [draw_packing(8, Objective.released(), generator) for _ in range(50)]
    assert {sum(draw.captioning) for draw in by_batch} == {0, 4}
    assert all(draw.retrieval == draw.generation for draw in by_batch)
    apart = Objective.released().model_copy(update={"separate_image_draws": True})
    assert any(
        d.retrieval != d.generation for d in (draw_packing(8, apart, generator) for _ in range(50))
    )


def test_pooled_target_is_part_of_the_generation_loss() -> None:
    model = tiny_model("opt", torch.float64)
    sizes = small_sizes(32, 2, False).model_copy(update={"D_pooled": 5})
    gill = MultimodalLanguageModel(LanguageModel(model, tiny_tokenizer()), Heads(sizes).double())
    batch = example_batch([3, 4], torch.float64)
    draws, objective = PackingDraws.same(2, False), Objective.paper()
    with pytest.raises(ValueError, match="no pooled targets"):
        training_losses(gill, batch, objective, draws)
    pooled_targets = torch.randn(2, 5, dtype=torch.float64)
    batch = CaptionBatch(**{**vars(batch), "pooled_targets": pooled_targets})
    losses = training_losses(gill, batch, objective, draws)
    hidden = gill.image_hidden(
        [[torch.tensor([2, *caption])] for caption in captions_of(batch)]
    ).mean(1)
    expected = (gill.heads.pooled_projection(hidden) - pooled_targets).square().mean()
    assert losses.pooled.item() == pytest.approx(expected.item(), rel=1e-12)
    assert losses.total.item() == pytest.approx(
        sum(getattr(losses, part).item() for part in (*PARTS[:-1], "pooled")), rel=1e-12
    )
