"""Retrieval: contextual on stories (Table 5), and of captions among held-out pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from corpora.records import Story
from evaluation.metrics.basic import truth_ranks
from evaluation.pictures import opened
from evaluation.progress import in_batches
from evaluation.results import Result
from evaluation.scores import Found, Rows, pooled_of
from evaluation.sets import Picture, caption_set, story_set
from evaluation.sources import Source, Sources
from gill.loading import Gill
from miniature.drawing import render
from miniature.language import EVERYTHING, caption
from miniature.world import SCENES, SCENES_OF, Scene
from pipeline.talking.reading import read_contexts
from settings.evaluation import EvaluationParams

KS = (1, 5, 10)
_VECTORS = 4096  # at a time


@torch.no_grad()
def table_5(gill: Gill, source: Source[Story], section: EvaluationParams) -> list[Result]:
    """VIST: the last picture of a story, found among the pictures of all stories by its context.

    Section 5, "Contextual Image Retrieval": "the VIST retrieval evaluation from [31]", which is
    evals/eval_vist_retrieval.py of FROMAGe: val split, stories that miss none of their pictures;
    the candidates are all their pictures, each once, without the four that the story has shown
    before. Table 5 has the context of five captions and four pictures; one and five captions alone
    are measured beside it. GILL compares W_t2i of its [IMG1] with W_i2t of the candidates.

    `clip` compares CLIP's text vector of the last caption with CLIP's picture vectors;
    `clip_captions` that of the story's five captions in one text, cut at CLIP's length. The printed
    CLIP row is quoted from [31]; this paper does not say what CLIP read.

    A limit shortens the stories that ask, not the candidates. Ties count against the truth.
    """
    pictures = {
        one.id: [p.image for p in one.pictures if p.image is not None] for one in source.examples
    }
    candidates = list(dict.fromkeys(name for shown in pictures.values() for name in shown))
    place = {name: row for row, name in enumerate(candidates)}
    asked = list(source.examples[: section.vist.limit])
    truth = torch.tensor([place[pictures[one.id][-1]] for one in asked])
    shown = [
        [place[name] for name in pictures[one.id][:-1] if name != pictures[one.id][-1]]
        for one in asked
    ]
    encoder, model = gill.encoder, gill.model
    pooled = pooled_of(encoder, candidates, "candidates of the stories")
    keys = in_batches(model.image_key, pooled, size=_VECTORS)
    joint = in_batches(encoder.project, pooled, size=_VECTORS)
    last = in_batches(encoder.encode_text, [one.captions[-1] for one in asked]) @ joint.T
    whole = in_batches(encoder.encode_text, [" ".join(one.captions) for one in asked]) @ joint.T
    rows: list[Result] = []
    for captions, with_pictures in ((1, False), (5, False), (5, True)):
        one = story_set(source, captions, pictures=with_pictures, limit=section.vist.limit)
        contexts = [example.context for example in one.examples]
        queries = in_batches(partial(_queries, gill), contexts, f"{one.title}, retrieval")
        by_method = {"gill": queries @ keys.T, "clip": last}
        if captions > 1:
            by_method["clip_captions"] = whole
        for method, similarities in by_method.items():
            scores = similarities.clone()
            for query, seen in enumerate(shown):
                scores[query, seen] = -torch.inf
            found = Found(values=recalls(scores, truth))
            made = Rows(one.name, one.title, len(one.examples), one.of, section.seed)
            rows += made.results(method, found)
    return rows


@torch.no_grad()
def caption_retrieval(gill: Gill, sources: Sources, section: EvaluationParams) -> list[Result]:
    """Complete captions against held-out pictures, both ways: no table of the paper.

    On the miniature world among distinct scenes, drawn anew: all of them, most seen in training,
    and those that never were. Otherwise among the pictures of the table's test split, at most 1000.
    """
    if not sources.is_miniature:
        one = caption_set(sources.captions, 1000)
        pooled = pooled_of(gill.encoder, [e.real for e in one.examples], "held-out pictures")
        rows = Rows("held_out_pictures", "Held-out pictures", len(pooled), one.of, section.seed)
        return _both_ways(gill, [e.prompt for e in one.examples], pooled, rows)
    rng = np.random.default_rng(section.seed)
    count = min(section.retrieval_scenes, len(SCENES))
    drawn = [SCENES[i] for i in rng.permutation(len(SCENES))[:count]]
    kinds = (
        ("all_scenes", "Distinct scenes, seen and unseen", drawn, len(SCENES)),
        ("held_out_scenes", "Unseen scenes", list(SCENES_OF["test"]), len(SCENES_OF["test"])),
    )
    results = []
    for name, title, scenes, of in kinds:
        rows = Rows(name, title, len(scenes), of, section.seed)
        results += _both_ways(gill, *_drawn(gill, scenes, section.seed), rows)
    return results


def recalls(
    similarities: Float[Tensor, "B N"], truth: Tensor, prefix: str = "recall_at_"
) -> dict[str, list[float]]:
    """Whether each query's true candidate is among the k best, for each k that says something."""
    ranks = truth_ranks(similarities, truth)
    ks = [k for k in KS if k <= similarities.shape[1]]
    return {f"{prefix}{k}": (ranks < k).double().tolist() for k in ks}


def _both_ways(
    gill: Gill, captions: Sequence[str], pooled: Float[Tensor, "N d"], rows: Rows
) -> list[Result]:
    model, encoder = gill.model, gill.encoder
    sides = {
        "gill": (
            in_batches(partial(_queries, gill), [[text] for text in captions]),
            in_batches(model.image_key, pooled, size=_VECTORS),
        ),
        "clip": (
            in_batches(encoder.encode_text, captions),
            in_batches(encoder.project, pooled, size=_VECTORS),
        ),
    }
    truth = torch.arange(len(captions))
    results = []
    for method, (text, picture) in sides.items():
        found = Found(values=recalls(text @ picture.T, truth))
        found.values |= recalls(picture @ text.T, truth, "image_to_text_recall_at_")
        results += rows.results(method, found)
    return results


def _drawn(gill: Gill, scenes: Sequence[Scene], seed: int) -> tuple[list[str], Tensor]:
    """Complete captions and pooled vectors of scenes drawn anew."""
    rng = random.Random(seed)
    pictures = [Image.fromarray(pixels) for pixels in render(scenes, seed + 1)]
    captions = [caption(scene, rng, EVERYTHING) for scene in scenes]
    return captions, in_batches(gill.encoder.encode_pictures, pictures)


def _queries(gill: Gill, contexts: Sequence[Sequence[str | Picture]]) -> Float[Tensor, "B p"]:
    """W_t2i of the [IMG1] after each context."""
    hidden = read_contexts(gill.model, gill.encoder, [opened(context) for context in contexts])
    return gill.model.text_query(hidden)
