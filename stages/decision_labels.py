"""How the classifier is made: labelled prompts, their hidden states, and what was measured.

Labels are votes of people in the released TSV format (`decision.votes`), or on the miniature world
of the oracle, written in the same format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corpora.parti_prompts import (
    PartiPrompt,
    VotedPrompt,
    agreed_label,
    paper_split,
    read_prompts,
    read_votes,
    write_votes,
)
from corpora.pictures import open_picture
from evaluation.metrics.uncertainty import mean_and_deviation
from evaluation.picture_votes import vote
from evaluation.published import DECISION_METHODS
from gill.artifacts import Artifacts
from gill.frozen import read_backbones
from gill.loading import Gill
from gill_errors import StageError
from gill_progress import Ticker
from miniature import oracle
from miniature.world import Scene
from pipeline.bridge.checkpoint import fingerprint_heads
from pipeline.devices import set_up
from pipeline.settings import DecisionSettings
from pipeline.talking.decision_fitting import fit_decision
from pipeline.talking.generation import generate_pictures
from pipeline.talking.reading import read_contexts
from pipeline.talking.retrieval import RetrievalIndex
from settings.params import Params
from stages.trained_weights import read_weights


def make_decision(params: Params, artifacts: Artifacts, folder: Path, metrics: Path) -> None:
    """Fit on the labelled prompts and write the classifier to `folder`, headlines to `metrics`.

    Weights that exist may bring a classifier (`training.weights`); it serves where no prompts are
    labelled here. Without either, say so and leave no classifier.
    """
    device = set_up(params.run.device, params.run.threads)
    folder.mkdir(parents=True, exist_ok=True)
    votes_file = params.decision.votes
    heads = fingerprint_heads(artifacts.heads(params.training.checkpoint))
    if votes_file is None and params.training.weights is not None:
        found = read_weights(params.training.weights, params, read_backbones(artifacts)).decision
        if found is not None:
            replace(found, heads=heads).save(folder)
            why = f"the classifier is that of {params.training.weights}"
            _write_metrics(folder, metrics, {"fitted": False, "why": why})
            print(why)
            return
    if votes_file is None and not params.is_miniature:
        _write_metrics(
            folder, metrics, {"fitted": False, "why": "decision.votes names no labelled prompts"}
        )
        print("no labelled prompts (decision.votes): no classifier; `auto` will generate")
        return
    # Not with the classifier of other heads that may lie in artifacts/decision.
    gill = Gill.load(
        artifacts,
        device=str(device),
        checkpoint=params.training.checkpoint,
        with_decision=False,
    )
    index = gill.index
    if index is None:
        raise StageError(f"{artifacts.index} is missing: run `stages build-index`")
    if votes_file is not None:
        voted = read_votes(Path(votes_file))
        hidden, similarity = _read_prompts(gill, index, [row.prompt for row in voted])
        labels = [agreed_label(row.votes) for row in voted]
        by = "people"
        # The last of the confident prompts in file order: appendix C's 201 and 110.
        test_rows: set[int] | None = set(paper_split(labels)[1])
        contents = None
    else:
        prompts = read_prompts(artifacts.miniature / "prompts.tsv")
        hidden, similarity = _read_prompts(gill, index, prompts)
        truth = json.loads((artifacts.miniature / "truth.json").read_text(encoding="utf-8"))
        scenes = [Scene(*scene) for scene in truth["prompts"]]
        labels = _oracle_labels(gill, index, hidden, params, scenes)
        # Other words for a scene that was trained on are no unseen prompt.
        contents = [" ".join(scene) for scene in scenes]
        voted = [VotedPrompt(p, (label,)) for p, label in zip(prompts, labels, strict=True)]
        write_votes(folder / "oracle_votes.tsv", voted)
        by = "the oracle of the miniature world"
        test_rows = None
    # "same" is no class: Table 6 is of prompts on which people agreed.
    kept = [i for i, label in enumerate(labels) if label != "same"]
    model, scores = fit_decision(
        hidden[kept],
        similarity[kept],
        [labels[i] for i in kept],
        params.decision,
        test=None if test_rows is None else torch.tensor([i in test_rows for i in kept]),
        contents=None if contents is None else [contents[i] for i in kept],
        votes=[voted[i].votes for i in kept] if by == "people" else None,
        heads=heads,
    )
    model.save(folder)
    scores["test_rows"] = [kept[row] for row in scores["test_rows"]]
    scores["over_seeds"] = _over_seeds(
        hidden[kept],
        similarity[kept],
        [labels[i] for i in kept],
        None if contents is None else [contents[i] for i in kept],
        params.decision,
    )
    counts = {name: labels.count(name) for name in ("gen", "ret", "same")}
    _write_metrics(folder, metrics, {"fitted": True, "labels_by": by, "labels": counts, **scores})
    for name in DECISION_METHODS:
        if name in scores:
            print(f"{name}: macro F1 {scores[name]['macro_f1']:.3f}")


def _over_seeds(
    hidden: Float[Tensor, "N r e"],
    similarity: Float[Tensor, " N"],
    labels: list[str],
    contents: list[str] | None,
    settings: DecisionSettings,
) -> dict[str, dict[str, float | None]]:
    """Mean and deviation of the macro F1 over splits drawn with five seeds."""
    scores: dict[str, list[float]] = {}
    for seed in range(5):
        _, found = fit_decision(
            hidden,
            similarity,
            labels,
            settings.model_copy(update={"seed": seed}),
            contents=contents,
        )
        for name in DECISION_METHODS:
            if name in found:
                scores.setdefault(name, []).append(found[name]["macro_f1"])
    return {
        name: dict(zip(("mean", "deviation"), mean_and_deviation(values), strict=True))
        for name, values in scores.items()
    }


@torch.no_grad()
def _read_prompts(
    gill: Gill, index: RetrievalIndex, prompts: Sequence[PartiPrompt]
) -> tuple[Float[Tensor, "N r e"], Float[Tensor, " N"]]:
    """Hidden states of the [IMG] tokens after each prompt, and the best candidate's cosine."""
    hidden = read_contexts(gill.model, gill.encoder, [[p.prompt] for p in prompts])
    queries = gill.model.text_query(hidden).float().cpu()
    return hidden.float().cpu(), index.max_similarity(queries)


def _oracle_labels(
    gill: Gill,
    index: RetrievalIndex,
    hidden: Float[Tensor, "N r e"],
    params: Params,
    scenes: Sequence[Scene],
) -> list[str]:
    """Which of the two pictures shows more of the prompt; alike and complete: the real one."""
    assert gill.generator is not None
    codes = np.array([scene.codes for scene in scenes])
    queries = gill.model.text_query(hidden).float().cpu()
    found = [hits[0] for hits in index.search(queries, 1)]
    retrieved = [open_picture(hit.image) for hit in found if hit.image is not None]
    with Ticker("pictures to judge", unit="pictures") as ticker:
        generated = generate_pictures(
            gill.generator,
            gill.model.conditioning(hidden),
            gill.empty_prompt,
            params.generation_settings,
            params.decision.seed,
            ticker.count,
        )
    # [N]: attributes shown as the prompt has them, of five.
    gen = (oracle.read_scenes(generated) == codes).sum(1)
    ret = (oracle.read_scenes(retrieved) == codes).sum(1)
    return [vote(int(g), int(r), codes.shape[1]) for g, r in zip(gen, ret, strict=True)]


def _write_metrics(folder: Path, metrics: Path, scores: dict[str, Any]) -> None:
    """Everything beside the classifier; one number per method for `dvc metrics show`."""
    metrics.parent.mkdir(parents=True, exist_ok=True)
    short = {
        name: round(scores[name]["macro_f1"], 4) for name in DECISION_METHODS if name in scores
    } or scores
    for path, content in (
        (folder / "evaluation.json", scores),
        (metrics, short),
    ):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
