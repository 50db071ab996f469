"""Several pictures as one."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def picture_grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows of so many, the last row filled up with black."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (min(len(pictures), columns) * width, rows * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % columns * width, number // columns * height))
    return grid
