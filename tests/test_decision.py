"""The decision model: what it computes, the released weights, and its two files."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.talking.decision import DecisionError, DecisionModel

N, R, E = 50, 2, 16


def _model(width: int = E + 1, **fields) -> DecisionModel:
    random = torch.Generator().manual_seed(0)
    return DecisionModel(
        torch.randn(2, width, generator=random),
        torch.randn(2, generator=random),
        torch.randn(width, generator=random),
        torch.rand(width, generator=random) + 0.5,
        **{"slope": 0.7, "offset": -0.2, "threshold": 0.4, "heads": "h1", **fields},
    )


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(N, R, E, generator=random), torch.rand(N, generator=random)


@pytest.mark.parametrize("tokens", ["first", "all"])
@pytest.mark.parametrize("use", [False, True])
def test_p_generate_is_the_standardised_linear_map(states: tuple, tokens, use: bool) -> None:
    hidden, similarity = states
    read = hidden[:, 0] if tokens == "first" else torch.cat([hidden[:, 0], hidden[:, 1]], 1)
    x = (torch.cat([read, similarity[:, None]], 1) if use else read).double()
    model = _model(x.shape[1], img_tokens=tokens, use_similarity=use)
    w = (model.weight[0] - model.weight[1]).double() / model.scale
    score = x @ w + float(model.bias[0] - model.bias[1]) - float(w @ model.mean.double())
    expected = 1 / (1 + (-(0.7 * score - 0.2)).exp())
    p = model.decide(hidden, similarity)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.double(), expected, rtol=0, atol=1e-5)


def test_a_model_without_the_similarity_ignores_it(states: tuple) -> None:
    hidden, similarity = states
    model = _model(E, use_similarity=False)
    assert torch.equal(model.decide(hidden), model.decide(hidden, similarity))


def test_states_in_half_precision_are_read_in_float32(states: tuple) -> None:
    hidden, similarity = (value.bfloat16() for value in states)
    expected = _model().decide(hidden.float(), similarity.float())
    assert torch.equal(_model().decide(hidden, similarity), expected)


def test_saved_and_loaded_it_decides_alike(states: tuple, tmp_path: Path) -> None:
    model = _model()
    model.save(tmp_path / "model" / "decision")
    assert sorted(path.name for path in (tmp_path / "model" / "decision").iterdir()) == [
        "decision.json",
        "decision.safetensors",
    ]
    again = DecisionModel.load(tmp_path / "model" / "decision", heads="h1")
    assert torch.equal(again.decide(*states), model.decide(*states))
    assert (again.threshold, again.heads) == (0.4, "h1")
    with pytest.raises(DecisionError, match="fitted on heads h1, but the current heads are h2"):
        DecisionModel.load(tmp_path / "model" / "decision", heads="h2")
    _model(offset=0.5).save(tmp_path / "model" / "decision")
    assert DecisionModel.load(tmp_path / "model" / "decision").offset == 0.5


def test_a_save_that_fails_leaves_the_model_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        _model(offset=0.5).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def _without_slope(folder: Path) -> None:
    record = json.loads((folder / "decision.json").read_text())
    del record["slope"]
    (folder / "decision.json").write_text(json.dumps(record))


def _of_format_2(folder: Path) -> None:
    record = json.loads((folder / "decision.json").read_text())
    (folder / "decision.json").write_text(json.dumps({**record, "format": 2}))


def _a_list(folder: Path) -> None:
    (folder / "decision.json").write_text("[]")


def _without_mean(folder: Path) -> None:
    tensors = load_file(folder / "decision.safetensors")
    del tensors["mean"]
    save_file(tensors, folder / "decision.safetensors")


def _another_width(folder: Path) -> None:
    tensors = load_file(folder / "decision.safetensors")
    save_file({**tensors, "scale": torch.ones(E)}, folder / "decision.safetensors")


def _three_classes(folder: Path) -> None:
    tensors = load_file(folder / "decision.safetensors")
    save_file({**tensors, "bias": torch.zeros(3)}, folder / "decision.safetensors")


def _no_safetensors(folder: Path) -> None:
    (folder / "decision.safetensors").write_bytes(b"damaged")


def _no_record(folder: Path) -> None:
    (folder / "decision.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_slope, "does not hold a decision model of format 1; fit it again"),
        (_of_format_2, "does not hold a decision model of format 1"),
        (_a_list, "does not hold a decision model of format 1"),
        (_without_mean, "does not hold a decision model of format 1"),
        (_another_width, r"decision.safetensors: scale is \(16,\), not \(17,\)"),
        (_three_classes, r"bias is \(3,\), not \(2,\)"),
        (_no_safetensors, "no decision model can be read from"),
        (_no_record, "no decision model can be read from"),
    ],
)
def test_a_damaged_model_is_refused(damage, message: str, tmp_path: Path) -> None:
    _model().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(DecisionError, match=message):
        DecisionModel.load(tmp_path)


def test_the_released_model_gives_the_same_logits(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "gill_released" / "decision_model.pth.tar"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    released = nn.Sequential(nn.Dropout(0.5), nn.Linear(4096, 2)).eval()
    released.load_state_dict(state)
    model = DecisionModel.from_linear(state["1.weight"], state["1.bias"], "h1")
    hidden = torch.randn(6, 8, 4096, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = released(hidden[:, 0])
    torch.testing.assert_close(model.logits(hidden, None), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decide(hidden), expected.softmax(1)[:, 0])
    # The more probable of the two, as argmax in the released code.
    assert (model.decide(hidden) >= model.threshold).tolist() == (expected.argmax(1) == 0).tolist()
    model.save(tmp_path)
    weight, bias = DecisionModel.load(tmp_path, heads="h1").to_linear()
    assert torch.equal(weight, state["1.weight"])
    assert torch.equal(bias, state["1.bias"])


def test_the_released_layout_holds_scaling_and_calibration(states: tuple) -> None:
    model = _model(E, use_similarity=False)
    linear = DecisionModel.from_linear(*model.to_linear())
    assert (linear.slope, linear.offset) == (1, 0)
    torch.testing.assert_close(linear.decide(states[0]), model.decide(states[0]), rtol=0, atol=1e-5)


def test_what_the_released_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(DecisionError, match="use_similarity false"):
        _model().to_linear()
    with pytest.raises(DecisionError, match='img_tokens "first"'):
        _model(R * E, img_tokens="all", use_similarity=False).to_linear()
    with pytest.raises(DecisionError, match=r"the bias has shape \(3,\), expected \(2,\)"):
        DecisionModel.from_linear(torch.ones(2, E), torch.ones(3))


def test_states_that_do_not_belong_to_the_model_are_refused(states: tuple) -> None:
    hidden, similarity = states
    with pytest.raises(
        DecisionError,
        match=r"got 9 features a row, .* fitted on 17 \(first \[IMG\] hidden states and the simil",
    ):
        _model().decide(hidden[:, :, :8], similarity)
    with pytest.raises(DecisionError, match="reads the highest cosine similarity"):
        _model().decide(hidden)
