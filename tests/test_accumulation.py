"""Micro-batches: the same losses and gradients as the whole batch, in less memory."""

import pytest
import torch

import pipeline.training.accumulation as accumulation
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import (
    Divisors,
    PackingDraws,
    captioning_loss,
    draw_packing,
    training_losses,
)
from pipeline.bridge.streams import (
    captioning_count,
    captioning_stream,
    image_streams,
    image_token_count,
)
from pipeline.bridge.streams import pair_rows as rows_of
from pipeline.frozen.language_model import LanguageModel
from pipeline.settings import MapperSizes, Objective, TrainingSettings
from pipeline.training.accumulation import backpropagate
from pipeline.training.stepping import Stepper
from tests.tiny_language_models import NUM_WORDS, tiny_model, tiny_tokenizer

PRESETS = {"paper": Objective.paper(), "released": Objective.released()}
PARTS = ("total", "captioning", "image_token", "text_to_image", "image_to_text", "generation")
SIZES = {"d": 6, "k": 2, "r": 3, "L": 4, "D": 5, "m": 8, "p": 4, "D_pooled": 3}


def build(
    objective: Objective, dtype: torch.dtype, name: str = "opt", start: bool = True
) -> MultimodalLanguageModel:
    language_model = LanguageModel(tiny_model(name, dtype), tiny_tokenizer(start))
    mapper = MapperSizes(
        encoder_layers=1, decoder_layers=1, adds_embedding=objective.token_reduction == "tokens"
    )
    torch.manual_seed(1)
    heads = Heads(HeadSizes(e=language_model.width, mapper=mapper, **SIZES)).to(dtype)
    with torch.no_grad():
        heads.image_embeddings.normal_(0, 0.3)
    return MultimodalLanguageModel(language_model, heads)


def example_batch(size: int, dtype: torch.dtype) -> CaptionBatch:
    g = torch.Generator().manual_seed(size)
    lengths = torch.randint(1, 12, (size,), generator=g).tolist()
    return CaptionBatch.from_lists(
        [torch.randint(3, NUM_WORDS, (n,), generator=g).tolist() for n in lengths],
        torch.randn(size, SIZES["d"], generator=g, dtype=torch.float64).to(dtype),
        torch.randn(size, SIZES["L"], SIZES["D"], generator=g, dtype=torch.float64).to(dtype),
        torch.arange(size),
        max_tokens=99,
        pooled_targets=torch.randn(size, SIZES["D_pooled"], generator=g).to(dtype),
    )


def gradients(gill: MultimodalLanguageModel) -> dict[str, torch.Tensor]:
    grads = {n: p.grad for n, p in gill.heads.named_parameters() if p.grad is not None}
    gill.zero_grad(set_to_none=True)
    return grads


def compare(
    gill: MultimodalLanguageModel,
    objective: Objective,
    batch: CaptionBatch,
    draws: PackingDraws,
    micro_batch_size: int,
    tolerance: float,
) -> None:
    whole = training_losses(gill, batch, objective, draws)
    whole.total.backward()
    expected = gradients(gill)
    losses = backpropagate(gill, batch, objective, draws, micro_batch_size)
    ours = gradients(gill)
    for part in (*PARTS, "pooled"):
        assert float(getattr(losses, part)) == pytest.approx(
            float(getattr(whole, part).detach()), rel=tolerance
        ), part
    assert ours.keys() == expected.keys()
    overall = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        # A gradient that is zero but for rounding counts against all.
        scale = torch.maximum(gradient.norm(), 1e-3 * overall)
        assert float((ours[name] - gradient).norm() / scale) < tolerance, name


DRAWS = {
    "alone": PackingDraws.same(11, False),
    "packed": PackingDraws.same(11, True),
    "mixed": PackingDraws(
        [True, False, True, True, False], *[[False, True, False, True, True]] * 2
    ),
    "drawn apart": PackingDraws(
        [False] * 5, [True, False, False, True, True], [False, False, True, True, True]
    ),
}


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("preset", PRESETS)
def test_micro_batches_give_the_step_of_the_whole_batch(preset: str, draws: str) -> None:
    objective = PRESETS[preset]
    batch = example_batch(11, torch.float64)
    gill = build(objective, torch.float64)
    for size in (2, 4, 10):  # the last parts have 1, 3 and 1 examples
        compare(gill, objective, batch, DRAWS[draws], size, 1e-11)


@pytest.mark.parametrize("preset", PRESETS)
def test_in_float32(preset: str) -> None:
    objective = PRESETS[preset]
    gill = build(objective, torch.float32)
    compare(gill, objective, example_batch(11, torch.float32), DRAWS["mixed"], 4, 1e-5)


def test_with_every_token_reduction_and_part_left_out() -> None:
    changes = [
        {"token_reduction": "tokens"},
        {"token_reduction": "tokens", "supervise_second": True, "retrieval_weight": 0.0},
        {"image_token_targets": "caption_and_image_token", "supervise_start": True},
        {"generation_weight": 0.0, "learn_temperature": False},
        {"captioning_weight": 0.0, "image_token_weight": 0.0},
        {"generation_weight": 0.0, "retrieval_weight": 0.0, "token_reduction": "tokens"},
    ]
    batch, gill = example_batch(11, torch.float64), build(Objective.paper(), torch.float64)
    for change in changes:
        objective = Objective(**change)
        compare(gill, objective, batch, DRAWS["drawn apart"], 4, 1e-11)


def test_serves_a_model_without_start_ids() -> None:
    objective = PRESETS["released"]
    gill = build(objective, torch.float64, "pythia-untied", start=False)
    compare(gill, objective, example_batch(11, torch.float64), DRAWS["mixed"], 4, 1e-11)


def test_a_share_of_the_batch_is_not_the_mean_of_shares() -> None:
    """The comparison above would fail if each part were divided by its own number of tokens."""
    objective = PRESETS["released"]
    gill, batch = build(objective, torch.float64), example_batch(11, torch.float64)
    draws = DRAWS["alone"]
    own = [Divisors.of(gill, b.lengths, objective, draws.part(*c)) for b, c in parts(batch, 4)]
    whole = Divisors.of(gill, batch.lengths, objective, draws)
    assert sum(divisors.captioning for divisors in own) == whole.captioning
    mean = sum(
        float(captioning_loss(gill, b, objective, draws.part(*c), d).detach())
        for (b, c), d in zip(parts(batch, 4), own)
    ) / len(own)
    exact = float(training_losses(gill, batch, objective, draws).captioning.detach())
    assert abs(mean - exact) > 1e-3 * exact


def parts(batch: CaptionBatch, size: int) -> list[tuple[CaptionBatch, tuple[int, int]]]:
    bounds = [(i, min(i + size, len(batch))) for i in range(0, len(batch), size)]
    return [(accumulation.take_examples(batch, *bound), bound) for bound in bounds]


def test_counts_are_those_of_the_streams() -> None:
    lengths = [3, 1, 7, 2, 5]
    for packed in ([False, False], [True, False], [True, True]):
        for num_start in (0, 1, 2):
            rows = rows_of(5, packed)
            for first in (False, True):
                stream = captioning_stream(lengths, rows, 2, num_start, first)
                counted = captioning_count(lengths, rows, num_start, first)
                assert counted == len(stream.targets)
                for second in (False, True):
                    both = image_streams(lengths, rows, 3, num_start, first, second)
                    counted = image_token_count(lengths, rows, num_start, first, second)
                    assert counted == len(both.prefix.targets) + len(both.suffix.targets)


def test_a_pair_is_never_cut() -> None:
    objective = PRESETS["paper"]
    gill, batch = build(objective, torch.float64), example_batch(4, torch.float64)
    with pytest.raises(ValueError, match="micro_batch_size is 3: an odd one would cut"):
        backpropagate(gill, batch, objective, PackingDraws.same(4, True), 3)
    with pytest.raises(ValueError, match="multiple of 2"):
        TrainingSettings(micro_batch_size=3)
    draws = PackingDraws([True, False, True], [False, True, False], [True, True, False])
    assert draws.part(2, 5) == PackingDraws([False], [True], [True])
    assert draws.part(4, 6) == PackingDraws([True], [False], [False])


def test_a_step_with_micro_batches_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = PRESETS["released"]
    whole, parted = (build(objective, torch.float32) for _ in range(2))
    settings = TrainingSettings(batch_size=11, learning_rate=1e-2, clip_norm=1.0)
    micro = settings.model_copy(update={"micro_batch_size": 4})
    batch = example_batch(11, torch.float32)
    coins = torch.Generator().manual_seed(3)
    draws = draw_packing(11, objective, coins)
    read: list[int] = []
    once = MultimodalLanguageModel.image_tokens

    def counted(
        self: MultimodalLanguageModel, batch: CaptionBatch, *args: object, **kwargs: object
    ) -> object:
        read.append(len(batch))
        return once(self, batch, *args, **kwargs)

    monkeypatch.setattr(MultimodalLanguageModel, "image_tokens", counted)
    steppers = Stepper(whole, objective, settings), Stepper(parted, objective, micro)
    steppers[0].take(0, batch, draws)
    assert read == [11]
    steppers[1].take(0, batch, draws)
    assert read == [11, *[4, 4, 3] * 2]
    expected, report = (stepper.settle() for stepper in steppers)
    assert report == pytest.approx(expected, rel=1e-5)


def kept(objective: Objective, micro_batch_size: int | None) -> int:
    """The most bytes that autograd keeps at once in a step."""
    gill, batch = build(objective, torch.float32), example_batch(32, torch.float32)
    alive = most = 0
    frozen = {p.data_ptr() for p in gill.language_model.model.parameters()}

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal alive, most
            self.tensor = tensor
            self.bytes = 0 if tensor.data_ptr() in frozen else tensor.nbytes
            alive += self.bytes
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        backpropagate(gill, batch, objective, PackingDraws.same(32, False), micro_batch_size)
    return most


def test_gradients_wait_for_no_more_than_one_part() -> None:
    """What autograd keeps at once is that of one part, not of the batch."""
    assert kept(PRESETS["paper"], 8) < 0.35 * kept(PRESETS["paper"], None)


@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_of_two_passes_one_is_kept(micro_batch_size: int | None) -> None:
    """The captioning pass is over when the image pass begins."""
    whole = PRESETS["paper"]
    others = ("image_token_weight", "retrieval_weight", "generation_weight")
    captioning = whole.model_copy(update=dict.fromkeys(others, 0.0))
    image = whole.model_copy(update={"captioning_weight": 0.0})
    parts = [kept(objective, micro_batch_size) for objective in (captioning, image)]
    assert kept(whole, micro_batch_size) == max(parts) < 0.8 * sum(parts)
