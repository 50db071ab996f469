"""How a scene of the miniature world is drawn."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from miniature.world import LOOKS, VALUES, Scene

PICTURE_SIZE = 32  # pixels, both ways

PLACE_RGB, COLOR_RGB, SIZE_RADIUS, SIDE_X = (
    np.array(list(LOOKS[name].values()), np.float32) for name in ("place", "color", "size", "side")
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
    # [n, 32, 3, 32, 3]: the mean over the nine samples within each pixel.
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
