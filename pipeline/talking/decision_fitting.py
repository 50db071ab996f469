"""Fits the retrieve-or-generate classifier, and measures it beside the baselines of Table 6.

Two F1 scores are in use. `macro_f1` is the mean of the F1 of "gen" and the F1 of "ret"; `f1_gen`
and `f1_ret` take one of them as the positive class. Table 6 prints the first: its constant answers
and its human votes come out so on the released annotations (`published` has the numbers).

The paper's ranges go over all thresholds on the test rows, so their upper ends are chosen on the
test rows. Here thresholds, like everything else, are chosen on the training rows; the ranges are
reported beside them as `test_lowest` and `test_highest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import (
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_val_predict,
    train_test_split,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pipeline.settings import DecisionSettings
from pipeline.talking.decision import DecisionError, DecisionModel, decision_features

_THRESHOLDS = np.linspace(0, 1, 101)
_DRAWS = 1000

Metrics = dict[str, Any]


def fit_decision(
    hidden: Float[Tensor, "N r e"],
    similarity: Float[Tensor, " N"],
    labels: Sequence[str],
    settings: DecisionSettings,
    *,
    test: Bool[Tensor, " N"] | None = None,
    contents: Sequence[str] | None = None,
    votes: Sequence[Sequence[str]] | None = None,
    heads: str = "",
) -> tuple[DecisionModel, Metrics]:
    """Fit the classifier on the training rows and measure all methods of Table 6 on the test rows.

    `labels` are "gen" or "ret" (leave prompts without agreement out beforehand). `test` marks the
    test rows; None draws a stratified share. `contents` say what each prompt means, where several
    mean the same in other words: those stay together, in the test rows and in each fold (None:
    every prompt is its own). `votes` are the annotators' votes per row ("gen", "ret", "same"), for
    the human performance.

    The penalty is chosen by stratified cross-validation on the training rows (macro F1, classes
    weighted by their inverse frequency); the out-of-fold scores of that choice give the calibration
    (Platt, unweighted) and the threshold; the model is then fitted on all training rows. No test
    row takes part.

    The metrics hold per method `macro_f1`, `f1_gen`, `f1_ret` and `accuracy` on the test rows:
    always_retrieve, always_generate, random (means over draws, with the 5th and 95th percentile),
    heuristic and linear (at the threshold chosen on the training rows; `test_lowest` and
    `test_highest` are the macro F1 over all thresholds, the paper's way), human where `votes` are
    given; and the class counts, the choices, the Brier score of p(generate) beside that of the
    training frequency, and which rows were test rows.

    DecisionError when a label is unknown, a value is not finite, or a class has too few rows.
    """
    features = decision_features(hidden, similarity, settings.img_tokens, settings.use_similarity)
    x = features.double().numpy()
    generate = _is_generate(labels)
    close = similarity.detach().double().cpu().numpy()
    if not (np.isfinite(x).all() and np.isfinite(close).all()):
        raise DecisionError("a hidden state or a similarity is not finite")
    groups = None if contents is None else np.unique(contents, return_inverse=True)[1]
    held_out = _draw_test(generate, groups, settings) if test is None else test.cpu().numpy()
    train = ~held_out
    _check_counts(generate, train, held_out, settings.folds)

    # [training rows] per strength: the score of each row by a classifier that has not seen it. All
    # that is chosen (penalty, calibration, threshold) is chosen on these.
    folds = _folds(settings.folds, groups, settings.seed)
    out_of_fold = {
        strength: cross_val_predict(
            _classifier(strength),
            x[train],
            generate[train],
            groups=None if groups is None else groups[train],
            cv=folds,
            method="decision_function",
        )
        for strength in sorted(settings.regularisation)
    }
    scores = np.stack(list(out_of_fold.values()), 1)
    quality = dict(zip(out_of_fold, f1_scores(generate[train], scores > 0)["macro_f1"].tolist()))
    # Of equals the first, which is the strongest penalty (the smallest C).
    strength = max(quality, key=lambda c: quality[c])
    slope, offset = _calibration(out_of_fold[strength], generate[train])
    calibrated = 1 / (1 + np.exp(-(slope * out_of_fold[strength] + offset)))
    best = _best_threshold(generate[train], calibrated)
    threshold = float(_THRESHOLDS[best])

    scaler, linear = _classifier(strength).fit(x[train], generate[train]).named_steps.values()
    # scikit-learn has one row for p(generate); the released layout has one for each class, and
    # their difference counts.
    half = torch.from_numpy(linear.coef_[0] / 2)
    half_bias = float(linear.intercept_[0]) / 2
    model = DecisionModel(
        torch.stack([half, -half]).float(),
        torch.tensor([half_bias, -half_bias]),
        torch.from_numpy(scaler.mean_).float(),
        torch.from_numpy(scaler.scale_).float(),
        slope=slope,
        offset=offset,
        threshold=threshold,
        img_tokens=settings.img_tokens,
        use_similarity=settings.use_similarity,
        heads=heads,
    )
    tested = torch.from_numpy(held_out)
    metrics = _table_6(
        generate,
        held_out,
        close,
        model.decide(hidden[tested], similarity[tested]).double().numpy(),
        best,
        settings.seed,
        [votes[row] for row in np.flatnonzero(held_out).tolist()] if votes is not None else None,
    )
    metrics["chosen"] = {
        "regularisation": strength,
        "threshold": threshold,
        "cross_validated_macro_f1": quality[strength],
    }
    metrics["test_rows"] = np.flatnonzero(held_out).tolist()
    return model, metrics


def f1_scores(
    truth: Bool[np.ndarray, " N"], answers: Bool[np.ndarray, "N A"]
) -> dict[str, Float[np.ndarray, " A"]]:
    """`macro_f1`, `f1_gen`, `f1_ret` and `accuracy` of each column of answers; True is "gen".

    F1 without a case is 0.
    """
    every = np.repeat(truth[:, None], answers.shape[1], axis=1)
    # To scikit-learn, columns are labels of one multi-label problem: a single call scores all of
    # them for "gen" (first A) and for "ret" (last A), where one call per column takes seconds.
    both = f1_score(
        np.hstack([every, ~every]), np.hstack([answers, ~answers]), average=None, zero_division=0.0
    )
    f1_gen, f1_ret = np.split(both, 2)
    return {
        "macro_f1": (f1_gen + f1_ret) / 2,
        "f1_gen": f1_gen,
        "f1_ret": f1_ret,
        "accuracy": (every == answers).mean(0),
    }


def human_performance(votes: Sequence[Sequence[str]]) -> dict[str, float]:
    """Each annotator against the majority of the others, averaged over the annotators.

    Votes are "gen", "ret" or "same", one list per prompt in the order of the annotators. A prompt
    counts for an annotator who took a side there and whose fellows did by majority. On the 911
    confident prompts of the released annotations `macro_f1` is the number of Table 6.
    """
    scores = []
    for annotator in range(max(map(len, votes), default=0)):
        truth, own = [], []
        for row in votes:
            if annotator >= len(row) or row[annotator] == "same":
                continue
            others = [*row[:annotator], *row[annotator + 1 :]]
            # A tie among the others is no truth to be compared with.
            lead = others.count("gen") - others.count("ret")
            if lead:
                truth.append(lead > 0)
                own.append(row[annotator] == "gen")
        if truth:
            scores.append(f1_scores(np.array(truth), np.array(own)[:, None]))
    if not scores:
        raise DecisionError("human performance needs prompts with votes of several annotators")
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _classifier(strength: float) -> Pipeline:
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)
    return make_pipeline(StandardScaler(), model)


def _is_generate(labels: Sequence[str]) -> Bool[np.ndarray, " N"]:
    for row, label in enumerate(labels):
        if label not in ("gen", "ret"):
            raise DecisionError(f"label {row} is {label!r}, expected 'gen' or 'ret'")
    return np.array([label == "gen" for label in labels], dtype=bool)


def _folds(
    number: int, groups: Int[np.ndarray, " N"] | None, seed: int
) -> StratifiedKFold | StratifiedGroupKFold:
    """Both classes in each fold as they are in all rows; rows of one group in one fold."""
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    return kind(number, shuffle=True, random_state=seed)


def _draw_test(
    generate: Bool[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"] | None,
    settings: DecisionSettings,
) -> Bool[np.ndarray, " N"]:
    rows = np.arange(len(generate))
    try:
        if groups is None:
            _, test = train_test_split(
                rows,
                test_size=settings.test_fraction,
                stratify=generate,
                random_state=settings.seed,
            )
        else:  # a share of one part in n: no splitter keeps groups together and takes any share
            parts = _folds(round(1 / settings.test_fraction), groups, settings.seed)
            _, test = next(parts.split(rows, generate, groups))
    except ValueError as error:
        raise DecisionError(f"too few labels to draw test rows of each: {error}") from error
    return np.isin(rows, test)


def _check_counts(
    generate: Bool[np.ndarray, " N"],
    train: Bool[np.ndarray, " N"],
    held_out: Bool[np.ndarray, " N"],
    folds: int,
) -> None:
    for name, side in (("gen", generate), ("ret", ~generate)):
        if (train & side).sum() < folds or not (held_out & side).any():
            raise DecisionError(
                f"{(train & side).sum()} training and {(held_out & side).sum()} test rows are "
                f"labelled {name!r}; at least {folds} (one per fold) and 1 are needed"
            )


def _calibration(
    scores: Float[np.ndarray, " N"], generate: Bool[np.ndarray, " N"]
) -> tuple[float, float]:
    """Platt's slope and offset of p(generate) on out-of-fold scores.

    Not by CalibratedClassifierCV: it keeps the two numbers, which are all that is deployed, in
    private classes, and fits every fold once more.
    """
    # As good as no penalty: Platt's two numbers are those of the highest likelihood.
    fitted = LogisticRegression(C=1e6).fit(scores[:, None], generate)
    slope, offset = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope > 0:
        return slope, offset
    share = float(generate.mean())  # the scores carry nothing: the frequency is the best answer
    return 0.0, float(np.log(share / (1 - share)))


def _best_threshold(generate: Bool[np.ndarray, " N"], probability: Float[np.ndarray, " N"]) -> int:
    """Which of the thresholds has the best macro F1; of several the middle, the least sensitive.

    Not by TunedThresholdClassifierCV, which takes the first of several and fits every fold again.
    """
    quality = f1_scores(generate, probability[:, None] >= _THRESHOLDS)["macro_f1"]
    best = np.flatnonzero(quality == quality.max())
    return int(best[len(best) // 2])


def _table_6(
    generate: Bool[np.ndarray, " N"],
    held_out: Bool[np.ndarray, " N"],
    similarity: Float[np.ndarray, " N"],
    probability: Float[np.ndarray, " T"],
    threshold: int,
    seed: int,
    votes: Sequence[Sequence[str]] | None,
) -> Metrics:
    """All methods on the T test rows.

    `probability` and `votes` are of the test rows only; `threshold` is the chosen one's place.
    """
    truth, prior = generate[held_out], float(generate[~held_out].mean())
    # "Whenever the maximum cosine similarity is above a threshold, we return ret" (appendix C).
    far = similarity[:, None] <= _THRESHOLDS  # [N, thresholds]
    # Chosen on the training rows, like everything else.
    heuristic = int(np.argmax(f1_scores(generate[~held_out], far[~held_out])["macro_f1"]))
    constant = f1_scores(truth, np.tile([False, True], (len(truth), 1)))
    metrics: Metrics = {
        "always_retrieve": _column(constant, 0),
        "always_generate": _column(constant, 1),
        "random": _random_answers(truth, prior, seed),
        "heuristic": _over_thresholds(f1_scores(truth, far[held_out]), heuristic),
        "linear": _over_thresholds(
            f1_scores(truth, probability[:, None] >= _THRESHOLDS), threshold
        ),
        "brier": {
            "linear": float(((probability - truth) ** 2).mean()),
            "training_frequency": float(((prior - truth) ** 2).mean()),
        },
        "rows": {
            "train_gen": int((generate & ~held_out).sum()),
            "train_ret": int((~generate & ~held_out).sum()),
            "test_gen": int(truth.sum()),
            "test_ret": int((~truth).sum()),
        },
    }
    if votes is not None:
        metrics["human"] = human_performance(votes)
    return metrics


def _random_answers(truth: Bool[np.ndarray, " T"], prior: float, seed: int) -> dict[str, float]:
    """Scores of answers drawn at the training frequency, and what 90% of the draws lie between."""
    # [draws, T]: True is "gen".
    draws = np.random.default_rng(seed).random((_DRAWS, len(truth))) < prior
    scores = f1_scores(truth, draws.T)
    low, high = np.quantile(scores["macro_f1"], [0.05, 0.95])
    means = {name: float(values.mean()) for name, values in scores.items()}
    return {**means, "macro_f1_p05": float(low), "macro_f1_p95": float(high)}


def _over_thresholds(scores: dict[str, Float[np.ndarray, " A"]], chosen: int) -> Metrics:
    """The scores at the chosen threshold, and the whole sweep over all of them."""
    macro = scores["macro_f1"]
    return {
        **_column(scores, chosen),
        "threshold": float(_THRESHOLDS[chosen]),
        "test_lowest": float(macro.min()),
        "test_highest": float(macro.max()),
        "at_half": float(macro[len(_THRESHOLDS) // 2]),
        "sweep": [
            {
                "threshold": round(float(at), 2),
                **{name: round(value, 4) for name, value in _column(scores, row).items()},
            }
            for row, at in enumerate(_THRESHOLDS)
        ],
    }


def _column(scores: dict[str, Float[np.ndarray, " A"]], column: int) -> dict[str, float]:
    return {name: float(values[column]) for name, values in scores.items()}
