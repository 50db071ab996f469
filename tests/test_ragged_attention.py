"""Attention without a grid: a training step's numbers are those of the grid, and where torch's
kernel is missing or wrong the grid is what is used."""

from collections import Counter

import pytest
import torch
from test_objective import FLOAT32_INSIDE, build, compare, example_batch

from pipeline.bridge.objective import draw_packing
from pipeline.frozen import ragged_attention
from pipeline.frozen.packing import Packing
from pipeline.frozen.ragged_attention import RaggedKeys
from pipeline.settings import Objective
from tests import ragged_kernel


def test_keys_are_put_in_the_order_of_their_sequences() -> None:
    # Three sequences of 2, 1 and 3 tokens after prefixes of 1, 0 and 2: a grid of 3 x 2 places,
    # then 6 tokens.
    places, queries, keys = RaggedKeys.lists([2, 1, 3], [1, 0, 2])
    assert places.tolist() == [0, 6, 7, 8, 4, 5, 9, 10, 11]
    assert queries.tolist() == [0, 2, 3, 6]
    assert keys.tolist() == [0, 3, 4, 9]
    assert RaggedKeys.lists([2, 1], [0, 0])[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama-untied-grouped", "mistral-window"])
def test_a_step_without_a_grid_is_the_plain_step(name: str) -> None:
    objective = Objective.released()
    calls: Counter[int] = Counter()

    def counted(*args: object, **kwargs: object) -> object:
        calls["kernel"] += 1
        return ragged_kernel.attention(*args, **kwargs)  # type: ignore[arg-type]

    with ragged_kernel.on_cpu(counted):
        gill, plain = build(name, 3, objective, torch.float64)
        batch = example_batch([5, 1, 9, 3], torch.float64)
        draws = draw_packing(4, objective, torch.Generator().manual_seed(1))
        tolerances = (1e-6, 1e-5) if name in FLOAT32_INSIDE else (1e-12, 1e-9)
        calls.clear()
        compare(gill, plain, batch, objective, draws, *tolerances)
    layers = gill.language_model.model.config.num_hidden_layers
    assert calls["kernel"] >= 3 * layers  # captioning, and the image pass in two parts


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (lambda *a, **k: 1.1 * ragged_kernel.attention(*a, **k), "it differs by"),
        (lambda *a: None, "unexpected keyword"),
    ],
)
def test_a_kernel_that_fails_is_not_used_and_it_is_said(kernel: object, said: str) -> None:
    states = torch.randn(1, 4, 5, 8)
    with ragged_kernel.on_cpu(kernel):
        with pytest.warns(UserWarning, match=said):
            assert not ragged_attention.serves(states, states)
        # Once for all calls of this shape.
        assert not ragged_attention.serves(states, states)


def test_nothing_of_it_is_made_on_a_cpu() -> None:
    assert Packing.of([2, 3], torch.device("cpu")).ragged is None
    states = torch.randn(1, 4, 5, 8, dtype=torch.bfloat16)
    assert not ragged_attention.serves(states, states)
