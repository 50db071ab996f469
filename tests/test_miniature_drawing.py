"""How the miniature world is drawn: what is where, and what varies from picture to picture."""

import numpy as np
import pytest

from miniature.drawing import (
    COLOR_RGB,
    GROUND_RGB,
    LIGHT_RGB,
    LOWEST_SKY_LIGHT,
    PICTURE_SIZE,
    SKY_RGB,
    render,
    shape_coverage,
)
from miniature.world import SCENES, VALUES, Scene


def test_pictures_depend_on_the_seed_and_nothing_else():
    scenes = SCENES[:300]  # more than one block
    first = render(scenes, 7)
    assert first.shape == (300, 64, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, render(scenes, 7))
    assert (first != render(scenes, 8)).any()
    assert render([], 0).shape == (0, 64, 64, 3)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("ring", np.pi * (1 - 0.44**2)),
        ("square", (2 * 0.88) ** 2),
        ("triangle", 0.54 * 1.85**2),
        ("cross", 2 * (2 * 0.72) - 0.72**2),
    ],
)
def test_a_shape_covers_its_area_wherever_it_stands(shape, area):
    x, y = np.array([0.41, 0.503, 0.62]), np.array([0.55, 0.57, 0.6])
    radius = np.array([0.15, 0.2, 0.25])
    coverage = shape_coverage(VALUES["shape"].index(shape), x, y, radius)
    assert coverage.min() == 0
    assert coverage.max() == 1
    covered = coverage.sum((1, 2)) / PICTURE_SIZE**2
    np.testing.assert_allclose(covered, area * radius**2, rtol=0.03)
    # Its centre of gravity lies on its axis of symmetry.
    across = (np.arange(PICTURE_SIZE) + 0.5) / PICTURE_SIZE
    np.testing.assert_allclose((coverage.sum(1) @ across) / coverage.sum((1, 2)), x, atol=0.002)


def test_the_object_is_below_the_sky_with_its_light():
    first = Scene("meadow", "red", "ring", "big", "left")
    second = first._replace(color="white", shape="cross", side="right")
    one, other = (render([scene] * 50, 3) for scene in (first, second))
    first_row = int(LOWEST_SKY_LIGHT * PICTURE_SIZE)
    np.testing.assert_array_equal(one[:, :first_row], other[:, :first_row])
    assert (one[:, first_row:] != other[:, first_row:]).any()
    # The sun's own colour is seen in every picture, and never below that row.
    from_sun = np.abs(one.astype(int) - LIGHT_RGB[VALUES["place"].index("meadow")]).max(-1)
    assert (from_sun[:, :first_row] < 12).any((1, 2)).all()
    assert (from_sun[:, first_row:] > 20).all()


def test_a_big_square_has_its_colour_in_the_middle_and_its_place_around():
    scene = Scene("desert", "blue", "square", "big", "middle")
    picture = render([scene] * 40, 1).astype(float).mean(0)
    blue = COLOR_RGB[VALUES["color"].index("blue")]
    np.testing.assert_allclose(picture[32:40, 28:36].mean((0, 1)), blue, atol=18)
    np.testing.assert_allclose(picture[20:24, :4].mean((0, 1)), SKY_RGB[0], atol=12)
    np.testing.assert_allclose(picture[46:52, :4].mean((0, 1)), GROUND_RGB[0], atol=18)
    # Its side is 2 x 0.88 x 16 pixels long.
    num_blue = (np.abs(picture - blue).sum(-1) < 120).sum()
    assert num_blue == pytest.approx(28.16**2, rel=0.15)


def test_an_object_throws_a_shadow_and_is_lit_from_where_the_light_is():
    scene = Scene("night", "green", "ring", "big", "middle")
    pictures = render([scene] * 200, 5).astype(float).sum(-1)
    beside, under = pictures[:, 52:54, :6].mean((1, 2)), pictures[:, 52:54, 29:35].mean((1, 2))
    assert (under < beside).mean() > 0.95
    # Against the column of the moon: how much brighter the right half of the ring is.
    moon = (pictures[:, :17].max(1) @ np.arange(PICTURE_SIZE)) / pictures[:, :17].max(1).sum(1)
    left, right = pictures[:, 34:38, 17:22].mean((1, 2)), pictures[:, 34:38, 42:47].mean((1, 2))
    assert np.corrcoef(moon, right - left)[0, 1] > 0.6
