"""Reads what a picture shows from its pixels: pictures are judged by truth, not by a model."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from miniature.drawing import (
    COLOR_RGB,
    GROUND_RGB,
    LIGHT_RGB,
    LOWEST_SKY_LIGHT,
    PICTURE_SIZE,
    SIDE_X,
    SIZE_RADIUS,
    SKY_RGB,
    render,
    shape_coverage,
)
from miniature.world import ATTRIBUTES, SCENES, VALUES, Scene

UNKNOWN = -1
_FEWEST_PIXELS = 24  # of one colour, to count as an object
_LEAST_OVERLAP = 0.35  # intersection over union with the best template
_COLOR_TOLERANCE = 95.0  # RGB distance beyond which a pixel belongs to nothing
_PAINT_LIGHT = (0.62, 1.25)  # how dark and how light the colour of an object gets
_GROUND_LIGHT = (0.40, 1.20)  # in its shadow, and around the light
_EDGE_ROWS = PICTURE_SIZE // 8  # at the top and the bottom, where no object is
_FIRST_ROW = int(LOWEST_SKY_LIGHT * PICTURE_SIZE)  # below sun and moon

Pictures = NDArray[np.uint8] | Sequence[Image.Image]


@cache
def _templates() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Shapes of varied size and place: coverage [M, H x W], and (shape, size, side) [M, 3]."""
    covers, labels = [], []
    for shape in range(len(VALUES["shape"])):
        # In steps around the nominal sizes and places: no object is exactly there.
        grid = np.array(
            [
                (SIDE_X[side] + shift, y, SIZE_RADIUS[size] + growth, size, side)
                for size in range(len(VALUES["size"]))
                for growth in (-0.01, 0.0, 0.01)
                for side in range(len(VALUES["side"]))
                for shift in (-0.02, 0.0, 0.02)
                for y in (0.54, 0.56, 0.58, 0.60)
            ],
            np.float32,
        )
        covers.append(shape_coverage(shape, grid[:, 0], grid[:, 1], grid[:, 2]))
        sizes_sides = grid[:, 3:].astype(np.int64)
        labels.append(np.column_stack([np.full(len(grid), shape), sizes_sides]))
    whole = np.concatenate(covers)[:, _FIRST_ROW:]
    return whole.reshape(len(whole), -1), np.concatenate(labels)


@cache
def _edges_of_places() -> NDArray[np.float32]:
    """The middle colours of the first and the last rows of every place: [4, 2, 3]."""
    scenes = SCENES[::5]
    edges = _edges(render(scenes, 0))
    places = np.array([scene.codes[0] for scene in scenes])
    return np.stack([edges[places == code].mean(0) for code in range(len(VALUES["place"]))])


def _edges(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The middle colours of the first and the last rows, which hold no object: [N, 2, 3]."""
    halves = pixels[:, :_EDGE_ROWS], pixels[:, -_EDGE_ROWS:]
    return np.stack([np.median(rows, (1, 2)) for rows in halves], 1).astype(np.float32)


def _nearest_color(
    pixels: NDArray[np.float32], colors: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which of `colors` [n, C, 3] is nearest to each of `pixels` [n, P, 3], each in that light that
    brings it nearest, and its squared distance: both [n, P]. The six paints come first."""
    paints = len(COLOR_RGB)
    darkest, lightest = np.array(
        [_PAINT_LIGHT] * paints + [_GROUND_LIGHT] * (colors.shape[1] - paints), np.float32
    ).T
    # |p - light c|^2 = |p|^2 - light (2 p.c - light |c|^2), of which |p|^2 is the same for all.
    along = pixels @ colors.swapaxes(1, 2)  # [n, P, C]
    lengths = (colors * colors).sum(-1)[:, None]
    light = np.clip(along / lengths, darkest, lightest)
    gain = light * (2 * along - light * lengths)
    nearest = gain.argmax(-1)
    most = np.take_along_axis(gain, nearest[..., None], -1)[..., 0]
    return nearest, (pixels * pixels).sum(-1) - most


def as_pixels(pictures: Pictures) -> NDArray[np.uint8]:
    """Pictures as uint8 [N, 64, 64, 3]; PIL pictures of another size or mode are converted.

    Raises:
        ValueError: an array that is not uint8 [N, 64, 64, 3].
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
        pictures: uint8 [N, 64, 64, 3], or PIL pictures.
    """
    pixels = as_pixels(pictures)
    blocks = [_read_block(pixels[i : i + 256]) for i in range(0, len(pixels), 256)]
    return np.concatenate(blocks) if blocks else np.zeros((0, len(ATTRIBUTES)), np.int64)


def _read_block(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    n = len(pixels)
    codes = np.full((n, len(ATTRIBUTES)), UNKNOWN, np.int64)
    # By the sky's and the ground's colours together.
    distance = ((_edges(pixels)[:, None] - _edges_of_places()) ** 2).sum((-2, -1))
    codes[:, 0] = distance.argmin(1)

    # Every pixel goes to the nearest of the six paints and of what this place has around an object.
    values = pixels[:, _FIRST_ROW:].reshape(n, -1, 3).astype(np.float32)
    place = codes[:, :1]
    sky, ground, light = SKY_RGB[place], GROUND_RGB[place], LIGHT_RGB[place]  # [n, 1, 3]
    around = np.stack([sky, ground, (sky + ground) / 2, 0.8 * ground + 0.2 * light], 1)[:, :, 0]
    paints = np.broadcast_to(COLOR_RGB, (n, *COLOR_RGB.shape))
    nearest, squared = _nearest_color(values, np.concatenate([paints, around], 1))
    nearest[squared > _COLOR_TOLERANCE**2] = UNKNOWN
    # The object has the one paint of the six that most pixels have.
    counts = np.stack([(nearest == code).sum(1) for code in range(len(COLOR_RGB))], 1)
    color = counts.argmax(1)
    seen = counts.max(1) >= _FEWEST_PIXELS
    codes[seen, 1] = color[seen]

    covers, labels = _templates()
    mask = (nearest == color[:, None]).astype(np.float32)
    # [n, pixels] @ [pixels, M]: intersections, then over the unions.
    overlap = mask @ covers.T
    overlap /= np.maximum(mask.sum(1)[:, None] + covers.sum(1)[None] - overlap, 1e-6)
    matched = seen & (overlap.max(1) >= _LEAST_OVERLAP)
    codes[matched, 2:] = labels[overlap.argmax(1)[matched]]
    return codes


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
