"""Retrieve or generate, on prompts of other kinds than the classifier was fitted on, and on near
ties. Ours; the paper has PartiPrompts alone.

The miniature's classifier reads complete captions. The scenes of those prompts that fit-decision
held out are put into words anew, in four forms that all say every attribute:

    caption    as in the fit, in other words: what the other forms are compared with
    request    "show me a small red ring on the left in the desert."
    story      a complete caption of an earlier state, then the two events that lead to the scene
    dialogue   ten rounds of questions and answers

The oracle labels each as it labels the prompts of the fit (`evaluation.picture_votes`), from the
picture that GILL generates and the one that it retrieves for these very words. `decision_FORM` has
macro F1 and accuracy. Then all forms together, by how far apart the two pictures are:

    decision_apart_2, decision_apart_1   in this many attributes (2: or more); 1 is a near tie
    decision_both_right                  none, and both are right: called "ret"
    decision_both_wrong                  none, and neither is right: no answer is better

with `prompts` (how many), `accuracy`, and `confidence`, the mean of the larger of p(generate) and
1 - p(generate). Words are drawn by `evaluation.seed`; which scenes were held out depends on
`decision.seed`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from corpora.pictures import open_picture
from corpora.prompts import story_prompt
from evaluation.picture_votes import vote
from evaluation.pictures import opened
from evaluation.results import Result
from evaluation.scores import Found, Rows
from evaluation.sets import EvaluationSet, Example
from gill.loading import Gill
from miniature import oracle
from miniature.language import (
    CHANGEABLE,
    EVERYTHING,
    caption,
    dialogue,
    dialogue_prompt,
    event,
    opening_request,
)
from miniature.world import ATTRIBUTES, VALUES, Scene
from pipeline.talking.decision_fitting import f1_scores
from pipeline.talking.reading import read_contexts

Make = Callable[[EvaluationSet], list[Path]]
"""Makes GILL's pictures of a set."""


def _story(scene: Scene, rng: random.Random) -> str:
    changed = rng.sample(CHANGEABLE, 2)
    other = {n: rng.choice([v for v in VALUES[n] if v != getattr(scene, n)]) for n in changed}
    events = [event(scene, name, "it", rng) for name in changed]
    return story_prompt([caption(scene._replace(**other), rng), *events])


FORMS: dict[str, Callable[[Scene, random.Random], str]] = {
    "caption": caption,
    "request": lambda scene, rng: opening_request(scene, rng, EVERYTHING),
    "story": _story,
    "dialogue": lambda scene, rng: dialogue_prompt(dialogue(scene, rng)),
}
_APART = {
    "apart_2": "The pictures differ by two attributes or more",
    "apart_1": "by one",
    "both_right": "Both pictures are right",
    "both_wrong": "They are as wrong as each other",
}


@dataclass(frozen=True)
class _Judged:
    """Of N prompts: attributes right in generated and retrieved pictures, and what is decided."""

    generated: Int[np.ndarray, " N"]
    retrieved: Int[np.ndarray, " N"]
    p_generate: Float[np.ndarray, " N"]
    answers: Mapping[str, Bool[np.ndarray, " N"]]
    """By method; True is "gen"."""

    @property
    def labels(self) -> np.ndarray:
        """ "gen", "ret" or "same" per prompt."""
        pairs = zip(self.generated.tolist(), self.retrieved.tolist(), strict=True)
        return np.array([vote(g, r, len(ATTRIBUTES)) for g, r in pairs])

    def rows(self, chosen: Bool[np.ndarray, " N"]) -> _Judged:
        """Those prompts alone."""
        return _Judged(
            self.generated[chosen],
            self.retrieved[chosen],
            self.p_generate[chosen],
            {name: answers[chosen] for name, answers in self.answers.items()},
        )

    def scores(self) -> dict[str, Found]:
        """By method, on the prompts that have a label."""
        labelled = self.labels != "same"
        truth = self.labels[labelled] == "gen"
        found = {}
        for name, answers in self.answers.items():
            scores = f1_scores(truth, answers[labelled][:, None])
            found[name] = Found(whole={m: float(scores[m][0]) for m in ("macro_f1", "accuracy")})
        return found


def unseen_prompts(gill: Gill, folder: Path, truth: Path, seed: int, make: Make) -> list[Result]:
    """Decide on all forms of the held-out scenes.

    `folder`: what fit-decision wrote; `truth`: the miniature's scenes. Without a classifier that
    was fitted on the miniature's own prompts there is one result, which says so.
    """
    fitted = _read(folder / "evaluation.json")
    if gill.decision is None or gill.index is None or "test_rows" not in fitted:
        rows = Rows("decision_caption", "Retrieve or generate, captions", 0, 0, seed)
        why = f"{folder} holds no classifier of the miniature's prompts: run `stages fit-decision`"
        return [rows.absent("linear", "macro_f1", why)]
    prompts = _read(truth)["prompts"]
    scenes = [Scene(*prompts[row]) for row in fitted["test_rows"]]
    results, judged = [], []
    for form, say in FORMS.items():
        rng = random.Random(f"decision {form} {seed}")
        examples = [
            Example(f"{row}", (words,), words, "", scene)
            for row, scene in zip(fitted["test_rows"], scenes, strict=True)
            for words in [say(scene, rng)]
        ]
        title = f"Retrieve or generate, {form}"
        one = EvaluationSet(f"decision_{form}", title, examples, len(prompts))
        judged.append(_judge(gill, one, make(one), fitted["heuristic"]["threshold"]))
        labelled = int((judged[-1].labels != "same").sum())
        rows = Rows(one.name, title, labelled, len(examples), seed)
        for method, found in judged[-1].scores().items():
            results += rows.results(method, found)
    return results + _by_distance(_together(judged), seed)


def _judge(gill: Gill, one: EvaluationSet, made: Sequence[Path], threshold: float) -> _Judged:
    assert gill.index is not None
    assert gill.decision is not None
    hidden = read_contexts(gill.model, gill.encoder, [opened(e.context) for e in one.examples])
    with torch.no_grad():
        queries = gill.model.text_query(hidden).float().cpu()
    nearest = [hits[0] for hits in gill.index.search(queries, 1)]
    similarity = torch.tensor([hit.score for hit in nearest])
    p = gill.decision.decide(hidden, similarity).double().numpy()
    truth = np.array([e.scene.codes for e in one.examples if e.scene is not None])
    found = [open_picture(hit.image) for hit in nearest if hit.image is not None]
    return _Judged(
        (oracle.read_scenes([open_picture(path) for path in made]) == truth).sum(1),
        (oracle.read_scenes(found) == truth).sum(1),
        p,
        {
            "linear": p >= gill.decision.threshold,
            "heuristic": similarity.numpy() <= threshold,
            "always_generate": np.ones(len(p), bool),
            "always_retrieve": np.zeros(len(p), bool),
        },
    )


def _together(judged: Sequence[_Judged]) -> _Judged:
    answers = {n: np.concatenate([one.answers[n] for one in judged]) for n in judged[0].answers}
    return _Judged(
        np.concatenate([one.generated for one in judged]),
        np.concatenate([one.retrieved for one in judged]),
        np.concatenate([one.p_generate for one in judged]),
        answers,
    )


def _by_distance(judged: _Judged, seed: int) -> list[Result]:
    apart = np.abs(judged.generated - judged.retrieved)
    right = judged.generated == len(ATTRIBUTES)
    groups = {
        "apart_2": apart >= 2,
        "apart_1": apart == 1,
        "both_right": (apart == 0) & right,
        "both_wrong": (apart == 0) & ~right,
    }
    results = []
    for name, chosen in groups.items():
        count, part = int(chosen.sum()), judged.rows(chosen)
        rows = Rows(f"decision_{name}", _APART[name], count, len(chosen), seed)
        results.append(rows.whole("linear", "prompts", float(count)))
        if not count:
            continue
        confidence = np.maximum(part.p_generate, 1 - part.p_generate)
        results.append(rows.mean("linear", "confidence", confidence.tolist()))
        if name != "both_wrong":
            for method in ("linear", "heuristic"):
                right_answers = part.answers[method] == (part.labels == "gen")
                results.append(rows.mean(method, "accuracy", right_answers.astype(float).tolist()))
    return results


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
