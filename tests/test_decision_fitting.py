"""Fitting and Table 6, against scikit-learn, the released annotations and values by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from evaluation.published import PUBLISHED
from pipeline.settings import DecisionSettings
from pipeline.talking.decision import DecisionError, DecisionModel
from pipeline.talking.decision_fitting import f1_scores, fit_decision, human_performance

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


@pytest.mark.parametrize("columns", [1, 3])
def test_f1_of_each_column_is_that_of_scikit_learn(columns: int) -> None:
    random = np.random.default_rng(columns)
    truth, answers = random.random(40) < 0.3, random.random((40, columns)) < 0.6
    ours = f1_scores(truth, answers)
    for column, answer in enumerate(answers.T):
        for name, theirs in (
            ("macro_f1", f1_score(truth, answer, average="macro")),
            ("f1_gen", f1_score(truth, answer)),
            ("f1_ret", f1_score(~truth, ~answer)),
            ("accuracy", accuracy_score(truth, answer)),
        ):
            assert ours[name].shape == (columns,)
            assert ours[name][column] == pytest.approx(theirs), name


def test_f1_without_a_case_is_0() -> None:
    scores = f1_scores(np.array([True, True]), np.array([[True], [True]]))
    assert {name: values.item() for name, values in scores.items()} == {
        "macro_f1": 0.5,
        "f1_gen": 1,
        "f1_ret": 0,
        "accuracy": 1,
    }


def test_the_published_constant_answers_are_macro_averaged() -> None:
    """Table 6 needs two different sets of 311 prompts; see evaluation/published.yaml."""

    def constant(generate: int, retrieve: int) -> list[float]:
        """Of always "ret" and always "gen"."""
        truth = np.arange(generate + retrieve) < generate
        answers = np.tile([False, True], (len(truth), 1))
        return f1_scores(truth, answers)["macro_f1"].round(3).tolist()

    constants = ("always_retrieve", "always_generate")
    assert constant(198, 113) == [PUBLISHED[_of_table_6(method)] for method in constants]
    assert constant(201, 110) == [0.261, 0.393]  # the lower ends of the printed ranges


def _of_table_6(method: str) -> tuple[str, str, str, str]:
    return "table_6", "decision", method, "macro_f1"


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
    assert round(human_performance(votes)["macro_f1"], 3) == PUBLISHED[_of_table_6("human")]


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
    assert metrics["human"] == human_performance(votes[600:])


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


def test_the_classifier_is_scikit_learns_with_the_penalty_that_does_best_out_of_fold() -> None:
    hidden, similarity, labels = _data(seed=5)
    train = np.arange(240) % 4 != 0
    settings = DecisionSettings(seed=3, folds=4)
    model, metrics = fit_decision(
        hidden, similarity, labels, settings, test=torch.from_numpy(~train)
    )
    x = torch.cat([hidden[:, 0], similarity[:, None]], 1).double().numpy()
    y = np.array([label == "gen" for label in labels])
    folds = StratifiedKFold(4, shuffle=True, random_state=3)
    quality, pipelines = {}, {}
    for strength in settings.regularisation:
        pipelines[strength] = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=strength, class_weight="balanced", max_iter=5000),
        )
        answers = cross_val_predict(pipelines[strength], x[train], y[train], cv=folds)
        quality[strength] = f1_score(y[train], answers, average="macro")
    chosen = metrics["chosen"]["regularisation"]
    assert metrics["chosen"]["cross_validated_macro_f1"] == pytest.approx(quality[chosen])
    assert quality[chosen] == max(quality.values()) > min(quality.values())
    scores = cross_val_predict(
        pipelines[chosen], x[train], y[train], cv=folds, method="decision_function"
    )
    p = 1 / (1 + np.exp(-(model.slope * scores + model.offset)))
    assert np.abs(p.mean() - y[train].mean()) < 1e-3  # as Platt's method has it
    macro = [f1_score(y[train], p >= at / 100, average="macro") for at in range(101)]
    assert macro[round(100 * model.threshold)] == max(macro) > macro[50]
    logits = model.logits(hidden, similarity)
    expected = pipelines[chosen].fit(x[train], y[train]).decision_function(x)
    assert (logits[:, 0] - logits[:, 1]).numpy() == pytest.approx(expected, abs=1e-3)


def test_every_threshold_of_the_sweep_is_scored() -> None:
    hidden, similarity, labels = _data()
    test = torch.arange(240) % 3 == 0
    model, metrics = fit_decision(hidden, similarity, labels, DecisionSettings(), test=test)
    truth = np.array([label == "gen" for label in labels])[test]
    p = model.decide(hidden[test], similarity[test]).numpy()
    linear, heuristic = metrics["linear"], metrics["heuristic"]
    for row in (0, 31, 50, 100):
        for found, answers in (
            (linear, p >= row / 100),
            # "Above a threshold, we return ret" (appendix C).
            (heuristic, similarity[test].numpy() <= row / 100),
        ):
            assert found["sweep"][row] == {
                "threshold": row / 100,
                "macro_f1": round(f1_score(truth, answers, average="macro"), 4),
                "f1_gen": round(f1_score(truth, answers), 4),
                "f1_ret": round(f1_score(~truth, ~answers), 4),
                "accuracy": round(accuracy_score(truth, answers), 4),
            }
    for found in (linear, heuristic):
        macro = [one["macro_f1"] for one in found["sweep"]]
        assert len(macro) == 101
        ends = (found["test_lowest"], found["test_highest"])
        assert ends == pytest.approx((min(macro), max(macro)), abs=1e-4)
        assert found["at_half"] == pytest.approx(macro[50], abs=1e-4)
        chosen = found["sweep"][round(found["threshold"] * 100)]
        for name in ("macro_f1", "f1_gen", "f1_ret", "accuracy"):
            assert found[name] == pytest.approx(chosen[name], abs=1e-4)
    assert linear["threshold"] == model.threshold == metrics["chosen"]["threshold"]
    assert metrics["brier"]["linear"] == pytest.approx(((p - truth) ** 2).mean())


def test_thresholds_are_the_best_on_the_training_rows() -> None:
    # The similarity alone separates the two, with a wide gap; the hidden states say nothing.
    labels = ["gen", "ret"] * 50
    similarity = torch.tensor([0.25, 0.75]).repeat(50)
    # Other rows to test on, whose best thresholds would be elsewhere.
    similarity[80:] = torch.tensor([0.85, 0.95]).repeat(10)
    test = torch.arange(100) >= 80
    model, metrics = fit_decision(
        torch.zeros(100, 1, 2), similarity, labels, DecisionSettings(), test=test
    )
    assert metrics["heuristic"]["threshold"] == 0.25  # the first of those that separate
    assert metrics["heuristic"]["f1_gen"] == 0
    assert metrics["heuristic"]["test_highest"] == 1
    assert model.threshold == pytest.approx(0.5, abs=0.05)  # the middle of those that separate
    assert (model.decide(torch.zeros(2, 1, 2), torch.tensor([0.25, 0.75])) > 0.5).tolist() == [
        True,
        False,
    ]


def test_scores_that_carry_nothing_give_the_training_frequency() -> None:
    labels = ["gen"] * 90 + ["ret"] * 10 + ["gen", "ret"] * 200
    test = torch.arange(500) >= 100
    model, metrics = fit_decision(
        torch.zeros(500, 1, 2), torch.zeros(500), labels, DecisionSettings(), test=test
    )
    assert model.decide(torch.zeros(1, 1, 2), torch.ones(1)).item() == pytest.approx(0.9)
    # Half of the test rows are each: (0.1^2 + 0.9^2) / 2.
    assert metrics["brier"] == pytest.approx({"linear": 0.41, "training_frequency": 0.41})
    # A random answer is "gen" with 0.9: precision 0.5 and recall 0.9, or 0.5 and 0.1.
    random = metrics["random"]
    assert random["f1_gen"] == pytest.approx(2 * 0.5 * 0.9 / 1.4, abs=5e-3)
    assert random["f1_ret"] == pytest.approx(2 * 0.5 * 0.1 / 0.6, abs=5e-3)
    assert random["accuracy"] == pytest.approx(0.5, abs=5e-3)
    draws = np.random.default_rng(1).random((400, 2000)) < 0.9
    truth = np.array([True, False] * 200)
    ends = np.quantile(f1_scores(truth, draws)["macro_f1"], [0.05, 0.95])
    assert (random["macro_f1_p05"], random["macro_f1_p95"]) == pytest.approx(ends, abs=5e-3)


def test_scores_that_are_wrong_out_of_fold_are_not_turned_round() -> None:
    # Every state is there twice, with both labels: what was learnt from one is wrong of the other.
    hidden = torch.eye(20).repeat_interleave(2, 0)[:, None]
    labels = ["gen", "ret"] * 20
    settings = DecisionSettings(use_similarity=False, regularisation=(1.0,))
    test = torch.arange(40) >= 36
    model, metrics = fit_decision(hidden, torch.zeros(40), labels, settings, test=test)
    assert model.decide(hidden).tolist() == [0.5] * 40
    # A probability of just the threshold means "gen": of 4 answers 2 are right.
    assert metrics["linear"]["sweep"][50]["f1_gen"] == 0.6667


def test_prompts_of_one_content_are_on_one_side() -> None:
    # Labels that nothing tells but having seen the same content in other words.
    contents = [f"scene {number}" for number in range(40) for _ in range(3)]
    hidden = torch.eye(40).repeat_interleave(3, 0)[:, None]
    labels = [label for label in ["gen", "ret"] * 20 for _ in range(3)]
    settings = DecisionSettings(use_similarity=False, regularisation=(1.0,))
    _, known = fit_decision(hidden, torch.zeros(120), labels, settings)
    model, unseen = fit_decision(hidden, torch.zeros(120), labels, settings, contents=contents)
    assert known["linear"]["accuracy"] > 0.9
    assert unseen["linear"]["accuracy"] <= 0.6
    assert sum(unseen["rows"].values()) == 120
    tested = unseen["rows"]["test_gen"] + unseen["rows"]["test_ret"]
    assert tested % 3 == 0
    assert tested == pytest.approx(40, abs=6)
    # The folds too: nothing is learnt of a content that is left out.
    assert unseen["chosen"]["cross_validated_macro_f1"] <= 0.6
    assert known["chosen"]["cross_validated_macro_f1"] > 0.8
    # What was tested was not trained on: its states have the weight that nothing gave them.
    assert int((model.weight.abs().sum(0) > 1e-6).sum()) == 40 - tested // 3


def test_test_rows_are_drawn_alike_from_both_labels() -> None:
    hidden, similarity, labels = (
        torch.randn(200, 1, 2),
        torch.rand(200),
        ["gen"] * 120 + ["ret"] * 80,
    )
    settings = DecisionSettings(test_fraction=0.25, regularisation=(1.0,))
    rows = [
        fit_decision(hidden, similarity, labels, settings.model_copy(update={"seed": seed}))
        for seed in (0, 0, 1)
    ]
    for _, metrics in rows:
        assert metrics["rows"] == {"train_gen": 90, "train_ret": 60, "test_gen": 30, "test_ret": 20}
    means = [model.mean for model, _ in rows]
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


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


def test_human_performance_by_hand() -> None:
    # Annotator 3 always says "ret"; the others agree with each other on both sides.
    votes = [["gen", "gen", "ret"], ["ret", "ret", "ret"], ["same", "gen", "ret"]]
    # 1: prompt 1 has others gen, ret (a tie, out), prompt 2 right. 2: prompt 2 right, prompt 3
    # against "ret" (others same, ret): wrong. 3: prompt 1 wrong, 2 right, 3 wrong.
    first = (0 + 1) / 2  # nobody says "gen" there: its F1 is 0
    second = (0 + 2 / 3) / 2
    third = (0 + 2 * 1 / (1 + 3)) / 2
    expected = (first + second + third) / 3
    assert human_performance(votes)["macro_f1"] == pytest.approx(expected)
    with pytest.raises(DecisionError, match="several annotators"):
        human_performance([["same", "same"]])


def test_what_cannot_be_fitted_is_refused(fitted: tuple) -> None:
    hidden, similarity, labels = _data(40)
    with pytest.raises(DecisionError, match="label 1 is 'same'"):
        fit_decision(hidden, similarity, ["gen", "same", *labels[2:]], DecisionSettings())
    with pytest.raises(DecisionError, match="labelled 'ret'; at least 5"):
        fit_decision(hidden, similarity, ["gen"] * 40, DecisionSettings())
    for states, close in ((hidden, similarity / 0), (hidden / 0, similarity)):
        with pytest.raises(DecisionError, match="not finite"):
            fit_decision(states, close, labels, DecisionSettings(use_similarity=False))
    with pytest.raises(DecisionError, match="too few labels to draw test rows of each"):
        fit_decision(hidden, similarity, ["gen"] * 39 + ["ret"], DecisionSettings())
    alone = torch.arange(40) < 1
    with pytest.raises(DecisionError, match="training and 0 test rows are labelled"):
        fit_decision(hidden, similarity, labels, DecisionSettings(), test=alone)


def test_a_training_row_of_each_label_per_fold_is_enough() -> None:
    hidden, similarity, _ = _data(12)
    labels = ["gen", "ret"] * 6
    settings = DecisionSettings(regularisation=(1.0,))
    _, metrics = fit_decision(hidden, similarity, labels, settings, test=torch.arange(12) >= 10)
    assert metrics["rows"] == {"train_gen": 5, "train_ret": 5, "test_gen": 1, "test_ret": 1}
    with pytest.raises(DecisionError, match="4 training and 2 test rows are labelled 'gen'"):
        fit_decision(hidden, similarity, labels, settings, test=torch.arange(12) >= 8)
