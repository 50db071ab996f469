"""Follow-ups: a picture is asked for, and then the same with one attribute changed. No table of the
paper.

    user       Could you illustrate in the sea on the left a big red ring for me?
    assistant  (picture)
    user       Now make it blue.
    assistant  (picture, which is judged)

GILL talks as in `gill chat` with pictures of the kind "generate": of its first answer it remembers
what `talking.read_back` says. The generator alone reads the caption and the follow-up, one after
the other. Which attribute changes goes in turn; to which value is drawn with `evaluation.seed`.

    changed_attribute   share of the pictures in which the oracle reads the new value
    others_kept         of the attributes that were not to change, the share that is as asked for
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from PIL import Image

from corpora.pictures import open_picture
from evaluation.pictures import Method
from evaluation.progress import Meter
from evaluation.results import Record, Result
from evaluation.scores import Rows
from evaluation.sets import EvaluationSet, Example
from evaluation.store import EvaluationStore, key_for
from gill.loading import Gill
from miniature import oracle
from miniature.language import as_predicate
from miniature.world import ATTRIBUTES, VALUES, Scene
from pipeline.settings import GenerationSettings
from pipeline.talking.batch import reply_together
from settings.evaluation import EvaluationParams

_BATCH = 16
_SET = "follow_ups"
_PHRASINGS = {
    "place": ("The same {x}, please.", "And now {x}."),
    "color": ("Now make it {x}.", "The same in {x}, please."),
    "shape": ("Now {x} instead.", "Draw {x} instead, please."),
    "size": ("Make it {x}.", "It should be {x}."),
    "side": ("Now put it {x}.", "The same, but {x}."),
}


@dataclass(frozen=True)
class FollowUp:
    """A request, what is said after its picture, and what the next one is to show."""

    example: Example
    """Of the request."""
    attribute: str
    text: str
    scene: Scene


def follow_ups(asked: EvaluationSet, seed: int) -> list[FollowUp]:
    """One for each request whose truth is known."""
    draws = random.Random(f"follow-ups {seed}")
    made = []
    for number, example in enumerate(asked.examples):
        if (scene := example.scene) is None:
            continue
        turn, place = divmod(number, len(ATTRIBUTES))
        attribute = ATTRIBUTES[place]
        others = [v for v in VALUES[attribute] if v != getattr(scene, attribute)]
        value = draws.choice(others)
        ways = _PHRASINGS[attribute]
        text = ways[turn % len(ways)].format(x=as_predicate(attribute, value))
        made.append(FollowUp(example, attribute, text, scene._replace(**{attribute: value})))
    return made


def measure_follow_ups(
    gill: Gill,
    asked: EvaluationSet,
    section: EvaluationParams,
    settings: GenerationSettings,
    store: EvaluationStore,
    make: Callable[[EvaluationSet, Method], list[Path]],
) -> tuple[list[Result], list[Record]]:
    """`make` has the pictures of a set made by a method. Nothing where no truth is known."""
    said = follow_ups(asked, section.seed)
    if not said:
        return [], []
    title = "Follow-ups of one attribute"
    context = [_example(one) for one in said]
    pictures: dict[str, list[Path]] = {}
    first: list[Path] = []
    if "generator" in section.methods:
        pictures["generator"] = make(EvaluationSet(_SET, title, context, asked.of), "generator")
    if "gill" in section.methods:
        talks = _talks(gill, said, section.seed, settings, store)
        first = [before for before, _ in talks]
        pictures["gill"] = [after for _, after in talks]
    rows = Rows(_SET, title, len(said), asked.of, section.seed)
    scores = {method: _scores(said, paths) for method, paths in pictures.items()}
    results = [
        rows.mean(method, metric, values)
        for method, found in scores.items()
        for metric, values in found.items()
    ]
    records = []
    for number, one in enumerate(said):
        shown = ({"answer": str(first[number])},) if first else ()
        records.append(
            Record(
                set=_SET,
                id=f"{one.example.id} {one.attribute}",
                prompt=one.text,
                context=(*one.example.described, *shown, {"text": one.text}),
                real=one.example.real,
                scene=" ".join(one.scene),
                pictures={method: str(paths[number]) for method, paths in pictures.items()},
                scores={
                    f"{method}.{metric}": values[number]
                    for method, found in scores.items()
                    for metric, values in found.items()
                },
            )
        )
    return results, records


def _example(one: FollowUp) -> Example:
    """What the generator alone reads."""
    prompt = f"{one.example.prompt} {one.text}"
    context = (*one.example.context, one.text)
    return replace(one.example, context=context, prompt=prompt, scene=one.scene)


def _talks(
    gill: Gill,
    said: Sequence[FollowUp],
    seed: int,
    settings: GenerationSettings,
    store: EvaluationStore,
) -> list[tuple[Path, Path]]:
    """The pictures of both turns, made a batch of talks at a time; talk i has the seed + i."""
    keys = []
    for number, one in enumerate(said):
        sampled = settings.model_dump(mode="json")
        parts = (one.example.context, one.text, seed + number, sampled, gill.talking.read_back)
        keys.append([key_for(_SET, turn, *parts) for turn in ("request", "follow-up")])
    spans = [range(i, min(i + _BATCH, len(said))) for i in range(0, len(said), _BATCH)]
    known = [all(store.picture("gill", key) for key in pair) for pair in keys]
    todo = [span for span in spans if not all(known[i] for i in span)]
    with Meter("Follow-ups, GILL", sum(map(len, todo)), "talks") as meter:
        for span in todo:
            talks = [gill.conversation() for _ in span]
            for turn in (0, 1):
                prepared = []
                for talk, i in zip(talks, span, strict=True):
                    text = said[i].text if turn else said[i].example.context[0]
                    drawing = gill.settings(want="generate", max_images=1, seed=seed + i)
                    drawing = drawing.model_copy(update={"generation": settings})
                    prepared.append(talk.prepare([cast("str", text)], drawing))
                for i, reply in zip(span, reply_together(prepared), strict=True):
                    picture: Image.Image = reply.images[0].picture
                    store.save_picture("gill", _SET, 2 * i + turn, keys[i][turn], picture)
            meter.add(len(span))
    paths = [[store.picture("gill", key) for key in pair] for pair in keys]
    return [(cast("Path", before), cast("Path", after)) for before, after in paths]


def _scores(said: Sequence[FollowUp], pictures: Sequence[Path]) -> dict[str, list[float]]:
    changed, kept = [], []
    read = oracle.read_scenes([open_picture(path) for path in pictures])
    for one, codes in zip(said, read.tolist(), strict=True):
        right = {
            name: code == truth
            for name, code, truth in zip(ATTRIBUTES, codes, one.scene.codes, strict=True)
        }
        changed.append(float(right.pop(one.attribute)))
        kept.append(sum(right.values()) / len(right))
    return {"changed_attribute": changed, "others_kept": kept}
