"""Recomputed activations: the same gradients, twice the forward passes, less kept."""

import copy

import pytest
import torch
from torch import nn

from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws
from pipeline.frozen.backbones import BackboneError
from pipeline.settings import Objective, TrainingSettings
from pipeline.training.accumulation import backpropagate
from pipeline.training.recomputation import decoder_layers, recompute_activations
from pipeline.training.stepping import Stepper
from tests.test_accumulation import build, example_batch, gradients

DRAWS = PackingDraws([True, False], [False, True], [False, True])


def kept_bytes(gill: MultimodalLanguageModel) -> int:
    """What autograd keeps of a step, without the frozen weights."""
    frozen = {p.untyped_storage().data_ptr() for p in gill.language_model.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # Whole storages: a view keeps all of what it looks at.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage  # held: no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backpropagate(gill, example_batch(4, torch.float32), Objective.paper(), DRAWS)
    return sum(storage.nbytes() for storage in kept.values())


def count_forwards(gill: MultimodalLanguageModel) -> list[str]:
    """Notes every forward pass of the last layer's attention, with and without gradient."""
    calls: list[str] = []
    gill.language_model.read_start()  # once and for all
    attention = decoder_layers(gill.language_model.model)[-1].get_submodule("self_attn")

    def note(module: nn.Module, inputs: object) -> None:
        calls.append("gradient" if torch.is_grad_enabled() else "none")

    attention.register_forward_pre_hook(note)
    return calls


@pytest.mark.parametrize("name", ["opt", "llama-untied-grouped"])
def test_gradients_are_the_same_and_layers_run_again(name: str) -> None:
    objective, batch = Objective.paper(), example_batch(4, torch.float32)
    gill = build(objective, torch.float32, name)
    twin = copy.deepcopy(gill)
    recompute_activations(twin.language_model)
    calls, again = count_forwards(gill), count_forwards(twin)
    losses = backpropagate(gill, batch, objective, DRAWS)
    same = backpropagate(twin, batch, objective, DRAWS)
    assert torch.equal(losses.total, same.total)
    ours, theirs = gradients(gill), gradients(twin)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in ours.items():
        assert torch.equal(gradient, theirs[parameter]), parameter
    # Captions in front of [IMG] once; the captioning pass and the [IMG] states, and both again.
    assert calls == ["gradient", "none", "gradient"]
    assert sorted(again) == ["gradient"] * 4 + ["none"]


def test_less_is_kept_for_the_backward_pass() -> None:
    gill = build(Objective.paper(), torch.float32)
    whole = kept_bytes(gill)
    recompute_activations(gill.language_model)
    assert kept_bytes(gill) < 0.6 * whole


def test_a_copy_recomputes_with_its_own_weights() -> None:
    gill = build(Objective.paper(), torch.float32)
    recompute_activations(gill.language_model)
    twin = copy.deepcopy(gill)
    for mine, its in zip(
        decoder_layers(gill.language_model.model), decoder_layers(twin.language_model.model)
    ):
        assert its.forward.__self__ is its
        assert mine.forward.__self__ is mine


def test_the_setting_turns_it_on() -> None:
    objective, batch = Objective.paper(), example_batch(4, torch.float32)
    settings = TrainingSettings(recompute_activations=True, micro_batch_size=2)
    gill = build(objective, torch.float32)
    calls = count_forwards(gill)
    Stepper(gill, objective, settings).take(0, batch, DRAWS)
    # Two parts; without gradient: all captions and [IMG] states for the queries, then captions.
    assert (calls.count("gradient"), calls.count("none")) == (2 * 4, 2 * 2 + 2)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(BackboneError, match="Linear has no layers derived from"):
        decoder_layers(nn.Linear(2, 2))
