"""Fused decoder layers: a step's numbers stay, kernels are fewer, what cannot be is refused."""

import copy
import shutil
from functools import partial
from typing import Any

import jaxtyping
import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.random_models import batch_of, opt_gill
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.packing import Packing
from pipeline.frozen.quantization import Int8Linear, quantize
from pipeline.settings import Objective, TrainingSettings
from pipeline.training.accumulation import backpropagate
from pipeline.training.fusion import fuse_layers, join_products
from pipeline.training.recomputation import decoder_layers, recompute_activations
from pipeline.training.stepping import Stepper
from tests.test_accumulation import build, example_batch, gradients
from tests.test_device_counts import Counts
from tests.test_recomputation import DRAWS, kept_bytes
from tests.tiny_language_models import CONFIGURATIONS, tiny_model, tiny_tokenizer

OBJECTIVE = Objective.released()


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests compiled counts towards torch's limit of variants of a layer. Without checks
    of shapes, which torch cannot compile: layers fall into as many pieces as there are checks."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def assert_same_step(gill: MultimodalLanguageModel, twin: MultimodalLanguageModel) -> None:
    dtype = gill.language_model.dtype
    losses = backpropagate(gill, example_batch(4, dtype), OBJECTIVE, DRAWS)
    same = backpropagate(twin, example_batch(4, dtype), OBJECTIVE, DRAWS)
    torch.testing.assert_close(same.total, losses.total, rtol=1e-12, atol=0)
    ours, theirs = gradients(twin), gradients(gill)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-11 * gradient.abs().max(), name


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_joined_products_change_no_number(name: str) -> None:
    gill = build(OBJECTIVE, torch.float64, name)
    twin = copy.deepcopy(gill)
    join_products(twin.language_model)
    assert_same_step(gill, twin)


@pytest.mark.parametrize(
    ("name", "recomputed"), [("opt", False), ("opt", True), ("llama-untied-grouped", True)]
)
def test_fused_layers_change_no_number(name: str, recomputed: bool) -> None:
    gill = build(OBJECTIVE, torch.float64, name)
    twin = copy.deepcopy(gill)
    # Traced as for inductor, with torch's own kernels.
    fuse_layers(twin.language_model, backend="aot_eager")
    if recomputed:
        recompute_activations(twin.language_model)
    assert_same_step(gill, twin)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++ on a CPU")
def test_the_setting_compiles() -> None:
    gill = build(OBJECTIVE, torch.float64)
    twin = copy.deepcopy(gill)
    Stepper(twin, OBJECTIVE, TrainingSettings(fuse_layers=True))
    twin.heads.double().load_state_dict(gill.heads.state_dict())
    assert_same_step(gill, twin)
    assert counters["inductor"]
    with torch.inference_mode():
        packing = Packing.of([3, 2], torch.device("cpu"))
        inputs = twin.language_model.embed(torch.tensor([5, 6, 7, 8, 9]))
        states = [one.language_model.hidden_states(inputs, packing) for one in (gill, twin)]
    torch.testing.assert_close(states[1], states[0], rtol=1e-9, atol=1e-12)


def test_other_lengths_do_not_compile_anew() -> None:
    gill = build(OBJECTIVE, torch.float64)
    fuse_layers(gill.language_model, backend="aot_eager")
    made = []
    # Packed pairs, single captions, other numbers of either. That the number stays would say
    # little: after some variants torch gives up.
    for size in (4, 5, 6, 7, 8, 9):
        draws = PackingDraws.same(size, size % 2 == 0)
        backpropagate(gill, example_batch(size, torch.float64), OBJECTIVE, draws)
        made.append(counters["stats"]["unique_graphs"])
    assert 0 < made[-1] <= made[0] + 1


def test_a_layer_asks_for_fewer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "mean_row_norm", lambda self: 1.0)

    def kernels(gill: MultimodalLanguageModel) -> int:
        draws = PackingDraws.same(6, False)
        step = partial(backpropagate, gill, batch_of(gill, 6), OBJECTIVE, draws)
        step()
        with Counts() as counts:
            step()
        return counts.kernels

    gill = opt_gill("toy", "meta")
    before = kernels(gill)
    join_products(gill.language_model)
    layers = len(decoder_layers(gill.language_model.model))
    # Of each of three passes two products and a ReLU. Backwards, of two: two products and the sums
    # of three gradients, for one copy that lays these side by side.
    assert before - kernels(gill) == (3 * 3 + 2 * 3) * layers


def test_what_is_joined_keeps_little_more() -> None:
    gill = build(OBJECTIVE, torch.float32)
    before = kept_bytes(gill)
    join_products(gill.language_model)
    assert kept_bytes(gill) <= 1.1 * before
    assert all(not getattr(m, "waiting", None) for m in gill.language_model.model.modules())


def test_recomputation_saves_as_much() -> None:
    plain, gill = build(OBJECTIVE, torch.float32), build(OBJECTIVE, torch.float32)
    fuse_layers(gill.language_model, backend="aot_eager")
    recompute_activations(plain.language_model)
    recompute_activations(gill.language_model)
    assert kept_bytes(gill) <= kept_bytes(plain)


def test_quantised_layers_stay_as_they_are() -> None:
    model = tiny_model("opt", torch.float32)
    quantize(model, "int8", "cpu")
    fuse_layers(LanguageModel(model, tiny_tokenizer()), backend="aot_eager")
    assert isinstance(decoder_layers(model)[0].get_submodule("self_attn.q_proj"), Int8Linear)


def test_what_compiles_wrongly_or_not_at_all_is_refused() -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *args: [1.1 * x if isinstance(x, torch.Tensor) else x for x in graph(*args)]

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    language_model = build(OBJECTIVE, torch.float32).language_model
    with pytest.raises(BackboneError, match="run.fuse_layers: .* differs by .* set it to false"):
        fuse_layers(language_model, backend=wrong)
    with pytest.raises(BackboneError, match="cannot be compiled here; set it to false .*no comp"):
        fuse_layers(language_model, backend=broken)
