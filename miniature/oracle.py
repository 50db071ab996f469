"""Reads what a picture shows from its pixels: pictures are judged by truth, not by a model."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from miniature.drawing import (
    COLOR_RGB,
    PICTURE_SIZE,
    PLACE_RGB,
    SIDE_X,
    SIZE_RADIUS,
    shape_coverage,
)
from miniature.world import ATTRIBUTES, VALUES, Scene

UNKNOWN = -1
_COLOR_TOLERANCE = 95.0  # RGB distance beyond which a pixel belongs to nothing
_FEWEST_PIXELS = 12  # of one colour, to count as an object
_LEAST_OVERLAP = 0.35  # intersection over union with the best template

Pictures = NDArray[np.uint8] | Sequence[Image.Image]


@cache
def _templates() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Shapes of varied size and place: coverage [M, 1024], and (shape, size, side) [M, 3]."""
    covers, labels = [], []
    for shape in range(len(VALUES["shape"])):
        # In steps around the nominal sizes and places: no object is exactly there.
        grid = np.array(
            [
                (SIDE_X[side] + shift, y, SIZE_RADIUS[size] + growth, size, side)
                for size in range(len(VALUES["size"]))
                for growth in (-0.3, 0.1, 0.5)
                for side in range(len(VALUES["side"]))
                for shift in (-0.7, 0.0, 0.7)
                for y in (15.0, 15.6, 16.2, 16.8)
            ],
            np.float32,
        )
        covers.append(shape_coverage(shape, grid[:, 0], grid[:, 1], grid[:, 2]))
        sizes_sides = grid[:, 3:].astype(np.int64)
        labels.append(np.column_stack([np.full(len(grid), shape), sizes_sides]))
    return np.concatenate(covers).reshape(-1, PICTURE_SIZE**2), np.concatenate(labels)


def as_pixels(pictures: Pictures) -> NDArray[np.uint8]:
    """Pictures as uint8 [N, 32, 32, 3]; PIL pictures of another size or mode are converted.

    Raises:
        ValueError: an array that is not uint8 [N, 32, 32, 3].
    """
    if isinstance(pictures, np.ndarray):
        expected = (PICTURE_SIZE, PICTURE_SIZE, 3)
        if pictures.ndim != 4 or pictures.shape[1:] != expected or pictures.dtype != np.uint8:
            raise ValueError(
                f"pictures must be uint8 [N, {PICTURE_SIZE}, {PICTURE_SIZE}, 3], "
                f"got {pictures.dtype} {list(pictures.shape)}"
            )
        return pictures
    size = (PICTURE_SIZE, PICTURE_SIZE)
    converted = [picture.convert("RGB") for picture in pictures]
    rows = [
        np.asarray(p if p.size == size else p.resize(size, Image.Resampling.BOX)) for p in converted
    ]
    return np.stack(rows) if rows else np.zeros((0, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)


def read_scenes(pictures: Pictures) -> NDArray[np.int64]:
    """Reads the attributes of each picture: int64 [N, 5] of codes, -1 where unknown.

    The columns are in the order of `ATTRIBUTES`.

    Args:
        pictures: uint8 [N, 32, 32, 3], or PIL pictures.
    """
    pixels = as_pixels(pictures)
    blocks = [_read_block(pixels[i : i + 256]) for i in range(0, len(pixels), 256)]
    return np.concatenate(blocks) if blocks else np.zeros((0, len(ATTRIBUTES)), np.int64)


def _read_block(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    n = len(pixels)
    values = pixels.astype(np.float32)
    found = np.full((n, len(ATTRIBUTES)), UNKNOWN, np.int64)

    top, bottom = values[:, :5].mean((1, 2)), values[:, -5:].mean((1, 2))
    distance = ((PLACE_RGB[None, :, 0] - top[:, None]) ** 2).sum(-1)
    distance += ((PLACE_RGB[None, :, 1] - bottom[:, None]) ** 2).sum(-1)
    # By the sky's and the ground's colours together: top and bottom rows hold no object.
    found[:, 0] = distance.argmin(1)

    # Every pixel goes to the nearest of the six colours and the picture's own two background
    # colours.
    num_colors = len(COLOR_RGB)
    palette = np.concatenate(
        [np.broadcast_to(COLOR_RGB, (n, num_colors, 3)), top[:, None], bottom[:, None]], 1
    )
    # [n, pixels, 3] against [n, colours, 3] -> [n, pixels, colours], a colour at a time.
    flat = values.reshape(n, -1, 3)
    squared = np.stack(
        [((flat - palette[:, None, c]) ** 2).sum(-1) for c in range(num_colors + 2)], -1
    )
    nearest = np.where(squared.min(-1) < _COLOR_TOLERANCE**2, squared.argmin(-1), UNKNOWN)
    counts = np.stack([(nearest == c).sum(1) for c in range(num_colors)], 1)
    # The object has the one colour of the six that most pixels have.
    color = counts.argmax(1)
    seen = counts.max(1) >= _FEWEST_PIXELS
    found[seen, 1] = color[seen]

    covers, labels = _templates()
    mask = (nearest == color[:, None]).astype(np.float32)
    # [n, pixels] @ [pixels, M]: intersections, then over the unions.
    overlap = mask @ covers.T
    overlap /= np.maximum(mask.sum(1)[:, None] + covers.sum(1)[None] - overlap, 1e-6)
    matched = seen & (overlap.max(1) >= _LEAST_OVERLAP)
    found[matched, 2:] = labels[overlap.argmax(1)[matched]]
    return found


def score(pictures: Pictures, scenes: Sequence[Scene]) -> dict[str, float]:
    """How well pictures show what they should.

    Returns:
        `attributes`: share of attributes shown correctly; `exact`: share of pictures with all
        five correct; `standard_error`: of `attributes`, over pictures; and the share correct of
        each attribute, by its name.

    Raises:
        ValueError: no pictures, or not one scene per picture.
    """
    found = read_scenes(pictures)
    if len(found) != len(scenes) or not len(found):
        raise ValueError(
            f"one scene per picture needed, got {len(found)} pictures and {len(scenes)}"
        )
    right = found == np.array([scene.codes for scene in scenes])
    per_picture = right.mean(1)
    return {
        "attributes": float(per_picture.mean()),
        "exact": float(right.all(1).mean()),
        "standard_error": float(per_picture.std() / len(per_picture) ** 0.5),
        **{name: float(right[:, i].mean()) for i, name in enumerate(ATTRIBUTES)},
    }
