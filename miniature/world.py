"""The procedural world: 576 scenes of one object each, and how they are split.

A scene is one value of each of five attributes. Six of the 24 colour-shape pairs are rare. The
scenes, not the pictures, are split: a held-out scene is in no picture and no text that a backbone
or GILL is trained on.
"""

import random
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

Split = Literal["train", "val", "test"]

LOOKS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
VALUES: dict[str, tuple[str, ...]] = {name: tuple(looks) for name, looks in LOOKS.items()}
ATTRIBUTES = tuple(VALUES)
RARE_PAIRS = frozenset(
    (color, shape) for shape, colors in LOOKS["shape"].items() for color in colors
)
"""Colours and shapes that seldom occur together."""


class Scene(NamedTuple):
    """What a picture shows, in words: the fields are `ATTRIBUTES`, with values from `VALUES`."""

    place: str
    color: str
    shape: str
    size: str
    side: str

    @property
    def codes(self) -> tuple[int, ...]:
        """The index of each value within its attribute: `(place, color, shape, size, side)`."""
        return tuple(VALUES[name].index(value) for name, value in zip(ATTRIBUTES, self))

    @property
    def is_rare(self) -> bool:
        """Whether its colour and shape seldom occur together."""
        return (self.color, self.shape) in RARE_PAIRS


SCENES: tuple[Scene, ...] = tuple(Scene(*values) for values in product(*VALUES.values()))


def _split_scenes() -> dict[Split, tuple[Scene, ...]]:
    order = list(SCENES)
    random.Random("scenes of the miniature world").shuffle(order)
    num_test, num_val = len(order) // 10, len(order) // 20
    return {
        "test": tuple(order[:num_test]),
        "val": tuple(order[num_test : num_test + num_val]),
        "train": tuple(order[num_test + num_val :]),
    }


SCENES_OF: dict[Split, tuple[Scene, ...]] = _split_scenes()
SPLIT_OF: dict[Scene, Split] = {scene: name for name, part in SCENES_OF.items() for scene in part}
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def draw_scene(
    rng: random.Random, split: Split | None = None, rare_share: float | None = None
) -> Scene:
    """A random scene.

    Args:
        rng: source of chance.
        split: only scenes of this split; of all three if None.
        rare_share: the probability of a rare colour-shape pair; None draws uniformly, which
            makes it 1/4.
    """
    scenes = SCENES if split is None else SCENES_OF[split]
    if rare_share is not None:
        rare = rng.random() < rare_share
        scenes = tuple(scene for scene in scenes if scene.is_rare == rare)
    return rng.choice(scenes)
