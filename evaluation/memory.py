"""Memory over many turns: is a fact shown that was stated once, 1, 5 or 20 turns ago? Ours.

A dialogue about a held-out scene states one attribute in one round; all other rounds speak of the
other four. The fact stands so many rounds from the end, in a dialogue that begins with it, and in
one of 20 rounds: what differs between the first three is distance and length, between the last
three distance alone. Example n asks for attribute n mod 5, with the same other rounds in all five
sets. These are short and answered "yes": 20 rounds fill the 256 positions of the tiny language
model. The dialogues are those that the scenes' own places in the table draw, the same for every
seed of training.

    fact_shown   share of the pictures in which the oracle reads the stated value
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corpora.pictures import open_picture
from evaluation.sets import EvaluationSet, Example, caption_set
from evaluation.sources import CaptionSource
from miniature import oracle
from miniature.language import Round, as_predicate, dialogue, dialogue_prompt, stated
from miniature.world import ATTRIBUTES, Scene

DISTANCES = (1, 5, 20)
LONGEST = 20


@dataclass(frozen=True)
class FactExample(Example):
    """A dialogue that states `fact` once."""

    fact: str = ""
    """Name of the attribute."""


def memory(source: CaptionSource, limit: int) -> list[EvaluationSet]:
    """Dialogues about the first `limit` held-out pictures of the miniature world."""
    pictured = caption_set(source, limit)
    sets = []
    for distance, rounds in (
        *((distance, distance) for distance in DISTANCES),
        *((distance, LONGEST) for distance in DISTANCES if distance < LONGEST),
    ):
        ago = "1 turn ago" if distance == 1 else f"{distance} turns ago"
        sets.append(
            EvaluationSet(
                f"memory_{distance}_of_{rounds}",
                f"Stated {ago}, of {rounds}",
                [
                    _asked(one, n, distance, rounds)
                    for n, one in enumerate(pictured.examples)
                    if one.scene is not None
                ],
                pictured.of,
            )
        )
    return sets


def fact_scores(one: EvaluationSet, pictures: Sequence[Path]) -> dict[str, list[float]]:
    """Per picture whether it shows the fact of its dialogue; nothing for other sets."""
    asked = [example for example in one.examples if isinstance(example, FactExample)]
    if not asked:
        return {}
    read = oracle.read_scenes([open_picture(path) for path in pictures])
    return {
        "fact_shown": [
            float(codes[place] == example.scene.codes[place])
            for example, codes in zip(asked, read, strict=True)
            if example.scene is not None
            for place in [ATTRIBUTES.index(example.fact)]
        ]
    }


def _asked(pictured: Example, number: int, distance: int, rounds: int) -> FactExample:
    scene, fact = pictured.scene, ATTRIBUTES[number % len(ATTRIBUTES)]
    assert scene is not None
    rng = random.Random(f"memory {pictured.id}")
    plain = dialogue(scene, rng, len(ATTRIBUTES))
    [states] = [asked for asked in plain if stated(dialogue_prompt([asked])) == {fact}]
    others = _others(scene, fact, rng)
    # The same rounds behind the fact at each distance, and the same before it at each length.
    told = [*others[: rounds - distance], states, *others[rounds - distance : rounds - 1]]
    prompt = dialogue_prompt(told)
    return FactExample(pictured.id, (prompt,), prompt, pictured.real, scene, fact)


def _others(scene: Scene, fact: str, rng: random.Random) -> list[Round]:
    """Rounds about the other attributes, each as often as the others."""
    names = [name for name in ATTRIBUTES if name != fact]
    order: list[str] = []
    while len(order) < LONGEST:
        order += rng.sample(names, len(names))
    return [Round(f"is it {as_predicate(name, getattr(scene, name))}?", "yes") for name in order]
