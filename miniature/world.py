"""The procedural world: 576 scenes of one object each, how they are split, and how they are drawn.

A scene is one value of each of five attributes. Six of the 24 colour-shape pairs are rare. The
scenes, not the pictures, are split: a held-out scene is in no picture and no text that a backbone
or GILL is trained on.
"""

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

Split = Literal["train", "val", "test"]

PICTURE_SIZE = 32  # pixels, both ways

_LOOKS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
VALUES: dict[str, tuple[str, ...]] = {name: tuple(looks) for name, looks in _LOOKS.items()}
ATTRIBUTES = tuple(VALUES)
RARE_PAIRS = frozenset(
    (color, shape) for shape, colors in _LOOKS["shape"].items() for color in colors
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


# --- how a scene looks --------------------------------------------------------------------------

PLACE_RGB, COLOR_RGB, SIZE_RADIUS, SIDE_X = (
    np.array(list(_LOOKS[name].values()), np.float32) for name in ("place", "color", "size", "side")
)
_SUPERSAMPLING = 3


def shape_coverage(
    shape: int, x: NDArray[np.floating], y: NDArray[np.floating], radius: NDArray[np.floating]
) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, for n centres and radii: float32 [n, 32, 32], 0..1."""
    grid = (np.arange(PICTURE_SIZE * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING
    dx = ((grid[None, :] - x[:, None]) / radius[:, None]).astype(np.float32)[:, None, :]
    dy = ((grid[None, :] - y[:, None]) / radius[:, None]).astype(np.float32)[:, :, None]
    match VALUES["shape"][shape]:
        case "ring":
            squared = dx * dx + dy * dy
            inside = (squared < 1) & (squared > 0.2)
        case "square":
            inside = (abs(dx) < 0.88) & (abs(dy) < 0.88)
        case "triangle":
            inside = (dy < 0.9) & (abs(dx) < (dy + 0.95) * 0.54)
        case _:  # cross
            inside = ((abs(dx) < 0.36) & (abs(dy) < 1)) | ((abs(dy) < 0.36) & (abs(dx) < 1))
    cells = inside.reshape(len(x), PICTURE_SIZE, _SUPERSAMPLING, PICTURE_SIZE, _SUPERSAMPLING)
    return cells.mean((2, 4), dtype=np.float32)


def render(scenes: Sequence[Scene], seed: int) -> NDArray[np.uint8]:
    """Draws one picture per scene: uint8 [N, 32, 32, 3].

    The horizon, the exact place, size and brightness of the object and the noise vary from
    picture to picture.
    """
    pictures = [
        _render_block(scenes[start : start + 256], np.random.default_rng([seed, start]))
        for start in range(0, len(scenes), 256)
    ]
    return (
        np.concatenate(pictures)
        if pictures
        else np.zeros((0, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    )


def _render_block(scenes: Sequence[Scene], rng: np.random.Generator) -> NDArray[np.uint8]:
    n = len(scenes)
    place, color, shape, size, side = np.array([scene.codes for scene in scenes]).T
    horizon = rng.integers(14, 19, n)
    daylight = rng.uniform(0.97, 1.03, n).astype(np.float32)
    gloss = rng.uniform(0.95, 1.03, n).astype(np.float32)
    radius = SIZE_RADIUS[size] + rng.uniform(-0.2, 0.2, n)
    x = SIDE_X[side] + rng.uniform(-0.5, 0.5, n)
    y = 16 + rng.uniform(-1, 1, n)

    above = (np.arange(PICTURE_SIZE)[None, :] < horizon[:, None])[:, :, None, None]
    ground = np.where(above, PLACE_RGB[place, 0][:, None, None], PLACE_RGB[place, 1][:, None, None])
    ground = ground * daylight[:, None, None, None]
    coverage = np.empty((n, PICTURE_SIZE, PICTURE_SIZE, 1), np.float32)
    for code in range(len(VALUES["shape"])):
        chosen = shape == code
        coverage[chosen, ..., 0] = shape_coverage(code, x[chosen], y[chosen], radius[chosen])
    paint = (COLOR_RGB[color] * gloss[:, None])[:, None, None]
    noise = rng.standard_normal((n, PICTURE_SIZE, PICTURE_SIZE, 3), np.float32)
    return np.clip(ground * (1 - coverage) + paint * coverage + noise, 0, 255).astype(np.uint8)
