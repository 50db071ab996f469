"""The oracle: right about every real picture, unsure about what is none, and a fair judge."""

import numpy as np
import pytest
from PIL import Image

from miniature.drawing import render
from miniature.oracle import UNKNOWN, read_scenes, score
from miniature.world import ATTRIBUTES, SCENES, Scene


@pytest.mark.parametrize("seed", [0, 1])
def test_it_reads_every_scene_without_a_mistake(seed):
    found = read_scenes(render(SCENES, seed))
    np.testing.assert_array_equal(found, [scene.codes for scene in SCENES])


def test_it_knows_only_the_place_of_a_picture_without_an_object():
    empty = render([Scene("sea", "red", "ring", "small", "left")], 0)
    # The water on the right, where nothing is, over all that is below the light.
    empty[0, 16:] = empty[0, -16:, 40:].repeat(3, 0)[:, :1]
    np.testing.assert_array_equal(read_scenes(empty), [[2, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]])


def test_it_knows_no_shape_in_stripes():
    striped = render([Scene("desert", "blue", "ring", "small", "left")], 0)
    striped[0, ::4] = (25, 45, 235)
    assert read_scenes(striped)[0, 2:].tolist() == [UNKNOWN] * 3


def test_pil_pictures_of_any_size_read_the_same():
    scenes = SCENES[::37]
    pixels = render(scenes, 2)
    pictures = [Image.fromarray(each) for each in pixels]
    np.testing.assert_array_equal(read_scenes(pictures), read_scenes(pixels))
    larger = [picture.resize((128, 128), Image.Resampling.NEAREST) for picture in pictures]
    assert score(larger, scenes)["exact"] == 1.0


def test_score_counts_attributes_pictures_and_their_spread():
    right = Scene("sea", "red", "ring", "small", "left")
    two_wrong = right._replace(color="blue", side="right")
    result = score(render([right, two_wrong], 3), [right, right])
    assert result["attributes"] == pytest.approx(0.8)
    assert result["exact"] == 0.5
    # Per picture 1.0 and 0.6: deviation 0.2, over two pictures.
    assert result["standard_error"] == pytest.approx(0.2 / 2**0.5)
    per_attribute = {name: result[name] for name in ATTRIBUTES}
    assert per_attribute == {"place": 1.0, "color": 0.5, "shape": 1.0, "size": 1.0, "side": 0.5}


def test_it_refuses_what_are_no_pictures():
    with pytest.raises(ValueError, match="uint8"):
        read_scenes(np.zeros((2, 64, 64, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one scene per picture"):
        score(render(SCENES[:2], 0), SCENES[:3])
    with pytest.raises(ValueError, match="one scene per picture"):
        score([], [])
