"""The scenes of the miniature world: how many, how split, and what their pictures look like."""

import random

import numpy as np

from miniature.world import RARE_PAIRS, SCENES, SCENES_OF, SPLIT_OF, VALUES, Scene, draw_scene


def test_there_are_576_different_scenes():
    assert len(set(SCENES)) == len(SCENES) == 4 * 6 * 4 * 2 * 3


def test_codes_and_words_say_the_same():
    scene = Scene("sea", "green", "ring", "big", "right")
    assert scene.codes == (2, 4, 0, 1, 2)
    assert len({each.codes for each in SCENES}) == len(SCENES)


def test_every_scene_is_in_exactly_one_split():
    parts = {name: set(scenes) for name, scenes in SCENES_OF.items()}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 491,
        "val": 28,
        "test": 57,
    }
    assert set.union(*parts.values()) == set(SCENES)
    assert set(SPLIT_OF) == set(SCENES)
    # The shipped weights were trained on this very split: with another, their tests would be of no
    # worth, and the weights have to be trained anew.
    assert SCENES_OF["test"][0] == Scene("night", "white", "ring", "small", "right")
    assert SPLIT_OF[Scene("desert", "red", "ring", "big", "left")] == "train"


def test_training_scenes_show_every_value_and_every_pair_of_colour_and_shape():
    train = SCENES_OF["train"]
    for name, values in VALUES.items():
        assert {getattr(scene, name) for scene in train} == set(values)
    assert len({(scene.color, scene.shape) for scene in train}) == 24


def test_rare_pairs_are_six_and_drawn_as_often_as_asked():
    assert len(RARE_PAIRS) == 6
    rng = random.Random(0)
    drawn = [draw_scene(rng, "train", rare_share=0.1) for _ in range(2000)]
    assert abs(np.mean([scene.is_rare for scene in drawn]) - 0.1) < 0.02
    assert {SPLIT_OF[scene] for scene in drawn} == {"train"}
    assert all(draw_scene(rng, None, rare_share=1.0).is_rare for _ in range(50))
