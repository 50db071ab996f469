"""Stage evaluate: GILL beside the generator's own text encoder, on held-out examples.

Every example is generated twice with the same seed: once conditioned by the generator's own text
encoder, once by GILLMapper. Scores: CLIP similarity of generated and real picture (Tables 1 and 2),
recall of retrieval, and on the miniature world the oracle's share of right attributes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from app.gill import Gill
from corpora.caption_table import CaptionTable
from corpora.pictures import open_picture
from miniature import oracle
from miniature.language import EVERYTHING, caption
from miniature.world import SCENES, SCENES_OF, VALUES, Scene, render
from pipeline.backbones import Backbones
from pipeline.decoding import Context, DecodingSettings, decode
from pipeline.evaluation import (
    generate_pictures,
    gill_conditioning,
    read_contexts,
    text_conditioning,
)
from pipeline.metrics import mean_and_standard_error, recall_at_k
from pipeline.text_conditioner import TextConditioner, load_text_conditioner
from stages.devices import set_up
from stages.evaluation_sets import EvaluationSet, caption_set, dialogue_sets, story_sets
from stages.params import Params
from stages.paths import ARTIFACTS, METRICS
from stages.progress import Ticker

METHODS = {"generator": "generator alone", "gill": "GILL"}


def run(params: Params) -> None:
    """Write headline numbers to metrics/, all others, records and pictures to artifacts/."""
    device = set_up(params.run)
    gill = Gill.load(ARTIFACTS.root, device=str(device), checkpoint=params.run.checkpoint)
    generator = Backbones.read(ARTIFACTS.backbones).image_generator
    conditioner = load_text_conditioner(generator.path, dtype=generator.torch_dtype, device=device)
    is_miniature = params.captions.table == "miniature"
    table = CaptionTable(ARTIFACTS.captions)
    metrics: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    for one in _sets(params, table, is_miniature):
        scores, rows = _evaluate_set(one, gill, conditioner, params)
        metrics[one.name] = {"title": one.title, "examples": len(one.examples), **scores}
        records += rows
        print(f"{one.title}: {_summary(scores)}")
    metrics["retrieval"] = (
        _miniature_recall(gill, params) if is_miniature else _table_recall(gill, table)
    )
    metrics["captioning"] = _captioning(gill, table, params, records, is_miniature)
    _write_json(ARTIFACTS.evaluation / "evaluation.json", metrics)
    _write_json(METRICS / "evaluation.json", _headline(metrics))
    _write_json(ARTIFACTS.evaluation / "records.json", records)


def _headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that `dvc metrics show` and git compare."""
    short: dict[str, Any] = {}
    for name, found in metrics.items():
        for method in METHODS:
            if method in found:
                judged = found[method].get("oracle")
                value = judged["attributes"] if judged else found[method]["clip_similarity"]["mean"]
                short[f"{name}.{method}"] = round(value, 4)
    for name, found in metrics["retrieval"].items():
        short[f"retrieval.{name}.r1"] = found["text_to_image"][1]
    return short


def _sets(params: Params, table: CaptionTable, is_miniature: bool) -> list[EvaluationSet]:
    section = params.evaluation
    truth = ARTIFACTS.miniature / "truth.json" if is_miniature else None
    sets = [caption_set(table, section.captions, truth)]
    if is_miniature:
        sets += story_sets(ARTIFACTS.miniature, section.stories) if section.stories else []
        rounds = (1, 5, 10)
        if section.dialogues:
            sets += dialogue_sets(ARTIFACTS.miniature, section.dialogues, rounds)
    return sets


def _evaluate_set(
    one: EvaluationSet, gill: Gill, conditioner: TextConditioner, params: Params
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores per method, and one record per example."""
    speaker, section = gill.speaker, params.evaluation
    assert speaker.generator is not None
    hidden = read_contexts(speaker.gill, speaker.encoder, [e.context for e in one.examples])
    conditionings = {
        "generator": text_conditioning(conditioner, [e.prompt for e in one.examples]),
        "gill": gill_conditioning(speaker.gill, hidden),
    }
    real = _clip(gill, [example.picture for example in one.examples])
    folder = ARTIFACTS.evaluation / one.name
    folder.mkdir(parents=True, exist_ok=True)
    records = [_record(one, index, folder) for index in range(len(one.examples))]
    scores: dict[str, Any] = {}
    for method, conditioning in conditionings.items():
        with Ticker(f"{one.title}, {METHODS[method]}") as ticker:
            pictures = generate_pictures(
                speaker.generator,
                conditioning,
                speaker.empty_prompt,
                params.generation,
                section.seed,
                lambda done, total, t=ticker: t.show(f"{done} of {total} pictures"),  # type: ignore[misc]
            )
        similarity = (_clip(gill, pictures) * real).sum(-1)
        scores[method] = {"clip_similarity": _mean(similarity.tolist())}
        if one.scenes is not None:
            scores[method]["oracle"] = oracle.score(pictures, one.scenes)
        right = _right_attributes(pictures, one.scenes)
        for index, (record, picture) in enumerate(zip(records, pictures, strict=True)):
            record[f"{method}_clip_similarity"] = float(similarity[index])
            record[f"{method}_right"] = None if right is None else int(right[index])
            if index < section.examples_shown:
                record[method] = _save(picture, folder / f"{index:04d}_{method}.png")
    if speaker.index is not None:
        hits = speaker.index.search(speaker.gill.text_query(hidden).float().cpu(), 1)
        for index, (record, found) in enumerate(zip(records, hits, strict=True)):
            record["retrieval_score"] = found[0].score
            if index < section.examples_shown and found[0].image is not None:
                picture = open_picture(found[0].image)
                record["retrieved"] = _save(picture, folder / f"{index:04d}_retrieved.png")
    return scores, records


def _record(one: EvaluationSet, index: int, folder: Path) -> dict[str, Any]:
    example = one.examples[index]
    record: dict[str, Any] = {
        "set": one.name,
        "id": example.id,
        "prompt": example.prompt,
        "real": _save(example.picture, folder / f"{index:04d}_real.png"),
        "context_pictures": [
            _save(part, folder / f"{index:04d}_context{place}.png")
            for place, part in enumerate(example.context)
            if isinstance(part, Image.Image)
        ],
    }
    if one.scenes is not None:
        record["scene"] = " ".join(one.scenes[index])
    return record


def _miniature_recall(gill: Gill, params: Params) -> dict[str, Any]:
    """Complete captions against pictures of distinct scenes, drawn anew; chance is 1 / N."""
    rng = np.random.default_rng(params.evaluation.seed)
    count = min(params.evaluation.retrieval_scenes, len(SCENES))
    drawn = [SCENES[i] for i in rng.permutation(len(SCENES))[:count]]
    return {
        "all": _recall_of_scenes(gill, drawn, params.evaluation.seed),
        "held_out": _recall_of_scenes(gill, list(SCENES_OF["test"]), params.evaluation.seed),
    }


def _recall_of_scenes(gill: Gill, scenes: Sequence[Scene], seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    pictures = [Image.fromarray(pixels) for pixels in render(scenes, seed + 1)]
    return _recall(gill, [caption(scene, rng, EVERYTHING) for scene in scenes], pictures)


def _table_recall(gill: Gill, table: CaptionTable) -> dict[str, Any]:
    """Captions against pictures of the test split, each picture once."""
    one = caption_set(table, 1000, None)
    return {
        "held_out": _recall(
            gill, [e.prompt for e in one.examples], [e.picture for e in one.examples]
        )
    }


@torch.no_grad()
def _recall(gill: Gill, captions: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Recall at 1, 5 and 10 in both directions."""
    model, encoder = gill.speaker.gill, gill.speaker.encoder
    queries = model.text_query(read_contexts(model, encoder, [[text] for text in captions]))
    keys = model.image_key(_pooled(gill, pictures))
    similarities = (queries.float() @ keys.float().T).cpu()
    truth = torch.arange(len(captions))
    ks = [k for k in (1, 5, 10) if k <= len(captions)]
    return {
        "candidates": len(captions),
        "text_to_image": recall_at_k(similarities, truth, ks),
        "image_to_text": recall_at_k(similarities.T, truth, ks),
    }


def _captioning(
    gill: Gill,
    table: CaptionTable,
    params: Params,
    records: list[dict[str, Any]],
    is_miniature: bool,
) -> dict[str, Any]:
    """Text after a picture alone: greedy, up to the length that training captions were cut to."""
    model = gill.speaker.gill
    truth = ARTIFACTS.miniature / "truth.json" if is_miniature else None
    one = caption_set(table, params.evaluation.captions, truth)
    prefixes = model.visual_prefix(_pooled(gill, [e.picture for e in one.examples]))
    start = model.language_model.embed(torch.tensor(model.language_model.start_ids))
    answers = decode(
        model,
        Context(model.language_model, len(prefixes)),
        [torch.cat([start, prefix]) for prefix in prefixes],
        DecodingSettings(max_tokens=params.batches.max_caption_tokens, max_images=0),
    )
    texts = [answer.text.split(".")[0].strip() for answer in answers]
    for record, text in zip((r for r in records if r["set"] == "captions"), texts, strict=False):
        record["caption"] = text
    result: dict[str, Any] = {"examples": len(texts)}
    if one.scenes is not None:
        said, right = 0, 0
        for text, scene in zip(texts, one.scenes, strict=True):
            mentioned, agreed = _compare_caption(text, scene)
            said, right = said + mentioned, right + agreed
        result["attributes_said"] = said / len(texts)
        result["attributes_right"] = right / max(said, 1)
    return result


def _compare_caption(text: str, scene: Scene) -> tuple[int, int]:
    """How many attributes a caption names, and how many of them are the scene's."""
    words = set(text.replace(".", " ").split())
    named = {name: words & set(values) for name, values in VALUES.items()}
    right = [said == {getattr(scene, name)} for name, said in named.items() if said]
    return len(right), sum(right)


def _pooled(gill: Gill, pictures: Sequence[Image.Image]) -> Float[Tensor, "N d"]:
    encoder = gill.speaker.encoder
    batches = [
        encoder.encode_pictures(pictures[i : i + 128]).float() for i in range(0, len(pictures), 128)
    ]
    return torch.cat(batches)


def _clip(gill: Gill, pictures: Sequence[Image.Image]) -> Float[Tensor, "N c"]:
    """Unit vectors in the visual encoder's joint space."""
    return gill.speaker.encoder.project(_pooled(gill, pictures)).cpu()


def _right_attributes(
    pictures: Sequence[Image.Image], scenes: Sequence[Scene] | None
) -> np.ndarray | None:
    if scenes is None:
        return None
    truth = np.array([scene.codes for scene in scenes])
    return (oracle.read_scenes(pictures) == truth).sum(1)


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    mean, error = mean_and_standard_error(values)
    return {"mean": mean, "standard_error": error}


def _summary(scores: dict[str, Any]) -> str:
    parts = []
    for method, found in scores.items():
        text = f"{METHODS[method]} CLIP {found['clip_similarity']['mean']:.3f}"
        if "oracle" in found:
            text += f", oracle {found['oracle']['attributes']:.3f}"
        parts.append(text)
    return "; ".join(parts)


def _save(picture: Image.Image, path: Path) -> str:
    """Save a picture for the report, at most 256 pixels wide; gives its path."""
    small = picture.copy()
    small.thumbnail((256, 256))
    small.save(path)
    return str(path)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
