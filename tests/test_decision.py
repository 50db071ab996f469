"""The decision model and Table 6, against scikit-learn and the released annotations and weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from pipeline.decision import DecisionError, DecisionModel
from pipeline.decision_fitting import TABLE_6, f1_scores, fit_decision, human_performance
from pipeline.settings import DecisionSettings

R, E = 2, 16


def _data(number: int = 240, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """Labels that depend on one direction of the second token, the similarity, and noise."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(number, R, E, generator=random) * torch.linspace(0.1, 30, E)
    similarity = 0.3 + 0.1 * torch.randn(number, generator=random)
    noise = torch.randn(number, generator=random)
    score = hidden[:, 0, 3] / 6 - (similarity - 0.3) / 0.1 + 0.5 * noise + 0.5
    return hidden, similarity, ["gen" if value > 0 else "ret" for value in score.tolist()]


@pytest.fixture(scope="module")
def fitted() -> tuple[DecisionModel, dict]:
    return fit_decision(*_data(), DecisionSettings(), heads="h1")


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_that_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth, predicted = random.random((2, 40)) < [[0.3], [0.6]]
    ours = f1_scores(truth, predicted)
    assert ours["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert ours["f1_gen"] == pytest.approx(f1_score(truth, predicted))
    assert ours["f1_ret"] == pytest.approx(f1_score(~truth, ~predicted))
    assert ours["accuracy"] == (truth == predicted).mean()


def test_the_published_constant_answers_are_macro_averaged() -> None:
    """Table 6 needs two different sets of 311 prompts; see the module's docstring."""

    def constant(generate: int, retrieve: int, answer: bool) -> float:
        truth = np.arange(generate + retrieve) < generate
        return round(f1_scores(truth, np.full(len(truth), answer))["macro_f1"], 3)

    assert constant(198, 113, False) == TABLE_6["always_retrieve"][0]
    assert constant(198, 113, True) == TABLE_6["always_generate"][0]
    assert constant(201, 110, False) == TABLE_6["heuristic"][0]
    assert constant(201, 110, True) == TABLE_6["linear"][0]


def _released_votes(shared_data: Path) -> tuple[list[list[str]], list[str]]:
    folder = shared_data / "parti_prompts"
    votes = (folder / "PartiPromptsAllDecisions_Alignment.tsv").read_text("utf-8").splitlines()[1:]
    labels = (folder / "PartiPromptsDecisionsConfident.tsv").read_text("utf-8").splitlines()[1:]
    pairs = [(v.split("\t")[4].split(","), la.split("\t")[4]) for v, la in zip(votes, labels)]
    confident = [pair for pair in pairs if pair[1] != "same"]
    return [vote for vote, _ in confident], [label for _, label in confident]


def test_human_performance_is_the_published_one(shared_data: Path) -> None:
    votes, _ = _released_votes(shared_data)
    assert len(votes) == 911
    assert round(human_performance(votes)["macro_f1"], 3) == TABLE_6["human"][0]


def test_baselines_on_the_released_labels(shared_data: Path) -> None:
    votes, labels = _released_votes(shared_data)
    hidden = torch.randn(911, 1, 4, generator=torch.Generator().manual_seed(0))
    similarity = torch.linspace(0, 1, 911)
    settings = DecisionSettings(regularisation=(1.0,))
    _, metrics = fit_decision(
        hidden, similarity, labels, settings, test=torch.arange(911) >= 600, votes=votes
    )
    assert metrics["rows"] == {"train_gen": 391, "train_ret": 209, "test_gen": 201, "test_ret": 110}
    assert round(metrics["always_retrieve"]["macro_f1"], 3) == 0.261
    assert round(metrics["always_generate"]["macro_f1"], 3) == 0.393
    # Labels drawn at the class frequencies agree with each class by its frequency.
    assert metrics["random"]["macro_f1"] == pytest.approx(0.5, abs=0.01)
    assert metrics["random"]["macro_f1_p05"] < 0.46 < 0.54 < metrics["random"]["macro_f1_p95"]
    # Above a threshold of 0 all are retrieved, above 1 none.
    assert metrics["heuristic"]["sweep"][0]["macro_f1"] == pytest.approx(0.261, abs=1e-3)
    assert metrics["heuristic"]["sweep"][-1]["macro_f1"] == pytest.approx(0.393, abs=1e-3)
    assert 0.8 < metrics["human"]["macro_f1"] < 0.9


def test_the_linear_classifier_learns_what_the_heuristic_cannot_see(fitted: tuple) -> None:
    _, metrics = fitted
    linear, heuristic = metrics["linear"], metrics["heuristic"]
    constants = max(metrics[name]["macro_f1"] for name in ("always_retrieve", "always_generate"))
    assert linear["macro_f1"] > 0.8
    assert constants + 0.15 < heuristic["macro_f1"] < linear["macro_f1"] - 0.05
    assert linear["test_lowest"] <= linear["macro_f1"] <= linear["test_highest"]
    assert metrics["brier"]["linear"] < 0.7 * metrics["brier"]["training_frequency"]
    assert "human" not in metrics
    json.dumps(metrics)


def test_p_generate_is_the_standardised_linear_map(fitted: tuple) -> None:
    model, metrics = fitted
    hidden, similarity, _ = _data()
    p = model.decide(hidden, similarity)
    x = torch.cat([hidden[:, 0], similarity[:, None]], 1).double()
    w = (model.weight[0] - model.weight[1]).double() / model.scale
    score = x @ w + float(model.bias[0] - model.bias[1]) - float(w @ model.mean.double())
    expected = 1 / (1 + (-(model.slope * score + model.offset)).exp())
    torch.testing.assert_close(p.double(), expected, rtol=0, atol=1e-6)
    chosen = model.choose(hidden, similarity)
    assert chosen == ["gen" if value >= model.threshold else "ret" for value in p.tolist()]
    assert model.heads == "h1"
    assert model.threshold == metrics["chosen"]["threshold"]


def test_probabilities_are_calibrated_on_fresh_rows(fitted: tuple) -> None:
    hidden, similarity, labels = _data(4000, seed=1)
    p = fitted[0].decide(hidden, similarity)
    generate = torch.tensor([label == "gen" for label in labels]).float()
    for low in (0.0, 0.25, 0.5, 0.75):
        among = (p >= low) & (p < low + 0.25)
        assert float(generate[among].mean()) == pytest.approx(float(p[among].mean()), abs=0.1)


def test_no_test_row_is_used_for_a_choice(fitted: tuple) -> None:
    hidden, similarity, labels = _data()
    test = torch.arange(240) % 3 == 0
    first, _ = fit_decision(hidden, similarity, labels, DecisionSettings(), test=test)
    hidden, similarity = hidden.clone(), similarity.clone()
    hidden[test], similarity[test] = -hidden[test], 1 - similarity[test]
    turned = ["ret" if t and la == "gen" else la for t, la in zip(test.tolist(), labels)]
    turned[0] = "gen"
    second, _ = fit_decision(hidden, similarity, turned, DecisionSettings(), test=test)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.mean, second.mean)
    assert (first.slope, first.offset, first.threshold) == (
        second.slope,
        second.offset,
        second.threshold,
    )


def test_features_are_what_the_settings_say() -> None:
    hidden, similarity, labels = _data(80)
    for tokens, use, width in (
        ("first", False, E),
        ("all", True, R * E + 1),
        ("all", False, R * E),
    ):
        settings = DecisionSettings(img_tokens=tokens, use_similarity=use, regularisation=(0.1,))  # type: ignore
        model, _ = fit_decision(hidden, similarity, labels, settings)
        assert model.weight.shape == (2, width)
        assert model.decide(hidden, similarity).shape == (80,)


def test_saved_and_loaded_it_decides_alike(fitted: tuple, tmp_path: Path) -> None:
    model, _ = fitted
    model.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "decision.json",
        "decision.safetensors",
    ]
    again = DecisionModel.load(tmp_path, heads="h1")
    hidden, similarity, _ = _data(50, seed=2)
    assert torch.equal(again.decide(hidden, similarity), model.decide(hidden, similarity))
    assert again.choose(hidden, similarity) == model.choose(hidden, similarity)
    with pytest.raises(DecisionError, match="fitted on heads h1, but the current heads are h2"):
        DecisionModel.load(tmp_path, heads="h2")


def test_a_damaged_model_is_refused(fitted: tuple, tmp_path: Path) -> None:
    with pytest.raises(DecisionError, match="no decision model can be read"):
        DecisionModel.load(tmp_path)
    fitted[0].save(tmp_path)
    record = tmp_path / "decision.json"
    record.write_text(record.read_text().replace("slope", "steepness"))
    with pytest.raises(DecisionError, match="format 1"):
        DecisionModel.load(tmp_path)
    (tmp_path / "decision.safetensors").write_bytes(b"damaged")
    with pytest.raises(DecisionError, match="no decision model can be read"):
        DecisionModel.load(tmp_path)


def test_the_released_model_gives_the_same_logits(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "gill_released" / "decision_model.pth.tar"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    released = nn.Sequential(nn.Dropout(0.5), nn.Linear(4096, 2)).eval()
    released.load_state_dict(state)
    model = DecisionModel.from_linear(state["1.weight"], state["1.bias"])
    hidden = torch.randn(6, 8, 4096, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = released(hidden[:, 0])
    torch.testing.assert_close(model.logits(hidden, None), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decide(hidden), expected.softmax(1)[:, 0])
    assert model.choose(hidden) == ["gen" if g > r else "ret" for g, r in expected.tolist()]
    model.save(tmp_path)
    weight, bias = DecisionModel.load(tmp_path).to_linear()
    assert torch.equal(weight, state["1.weight"])
    assert torch.equal(bias, state["1.bias"])


def test_a_fitted_model_fits_the_released_layout() -> None:
    hidden, similarity, labels = _data(80)
    settings = DecisionSettings(use_similarity=False, regularisation=(0.1,))
    model, _ = fit_decision(hidden, similarity, labels, settings)
    linear = DecisionModel.from_linear(*model.to_linear())
    torch.testing.assert_close(linear.decide(hidden), model.decide(hidden), rtol=0, atol=1e-5)
    both, _ = fit_decision(hidden, similarity, labels, DecisionSettings(regularisation=(0.1,)))
    with pytest.raises(DecisionError, match="use_similarity false"):
        both.to_linear()


def test_human_performance_by_hand() -> None:
    # Annotator 3 always says "ret"; the others agree with each other on both sides.
    votes = [["gen", "gen", "ret"], ["ret", "ret", "ret"], ["same", "gen", "ret"]]
    # 1: prompt 1 has others gen, ret (a tie, out), prompt 2 right. 2: prompt 2 right, prompt 3
    # against "ret" (others same, ret): wrong. 3: prompt 1 wrong, 2 right, 3 wrong.
    first, second = (
        f1_scores(np.array([False]), np.array([False])),
        f1_scores(np.array([False, False]), np.array([False, True])),
    )
    third = f1_scores(np.array([True, False, True]), np.array([False, False, False]))
    expected = np.mean([score["macro_f1"] for score in (first, second, third)])
    assert human_performance(votes)["macro_f1"] == pytest.approx(expected)
    with pytest.raises(DecisionError, match="several annotators"):
        human_performance([["same", "same"]])


def test_what_cannot_be_fitted_is_refused(fitted: tuple) -> None:
    hidden, similarity, labels = _data(40)
    with pytest.raises(DecisionError, match="label 1 is 'same'"):
        fit_decision(hidden, similarity, ["gen", "same", *labels[2:]], DecisionSettings())
    with pytest.raises(DecisionError, match="labelled 'ret'; at least 5"):
        fit_decision(hidden, similarity, ["gen"] * 40, DecisionSettings())
    with pytest.raises(DecisionError, match="not finite"):
        fit_decision(hidden, similarity / 0, labels, DecisionSettings())
    with pytest.raises(DecisionError, match="got 9 features a row, .* fitted on 17"):
        fitted[0].decide(hidden[:, :, :8], similarity)
    with pytest.raises(DecisionError, match="reads the highest cosine similarity"):
        fitted[0].decide(hidden)
