"""What texts tell, against counting by hand, and by another program on a drawn world."""

import json

import pytest

from corpora.prompts import dialogue_prompt
from corpora.records import Story, StoryPicture
from corpora.visdial import read_dialogues
from corpora.vist import read_stories
from evaluation import sets
from evaluation.ceilings import oracle_ceiling
from evaluation.sources import Source
from miniature.corpus import draw
from miniature.world import Scene

SCENE = Scene(place="sea", color="red", shape="ring", size="big", side="left")


def _story(*captions: str) -> Source[Story]:
    told = tuple(StoryPicture(str(i), f"{i}.png", text) for i, text in enumerate(captions))
    return Source([Story("1", told)], 1, {"1": SCENE})


def test_what_is_told_counts_whole_and_the_rest_is_guessed_evenly():
    source = _story("a red ring.", "it becomes big.")
    by_hand = {
        (1, False): (1 / 4 + 1 / 6 + 1 / 4 + 1 + 1 / 3) / 5,  # its size alone
        (2, False): (1 / 4 + 1 + 1 + 1 + 1 / 3) / 5,
        (2, True): 1.0,  # the picture before shows the rest
    }
    for (captions, pictures), ceiling in by_hand.items():
        one = sets.story_set(source, captions, pictures=pictures, limit=None)
        assert oracle_ceiling(one, "gill") == pytest.approx(ceiling)
        # The generator reads words alone.
        words = by_hand[captions, False]
        assert oracle_ceiling(one, "generator") == pytest.approx(words)


def test_without_the_truth_there_is_no_ceiling():
    source = Source(_story("a ring.").examples, 1)
    assert oracle_ceiling(sets.story_set(source, 1, pictures=False, limit=None), "gill") is None


def test_the_ceilings_of_a_drawn_world(tmp_path):
    draw(tmp_path, pictures=40, held_out_pictures=10, stories=100, dialogues=100, prompts=1, seed=0)
    truth = json.loads((tmp_path / "truth.json").read_text())
    stories = Source(
        read_stories(tmp_path / "stories.json", tmp_path / "story_images", "exists")[0],
        100,
        {id_: Scene(*told[-1]) for id_, told in truth["stories"].items()},
    )
    dialogues = Source(
        read_dialogues(tmp_path / "dialogues.json", images_dir=tmp_path / "dialogue_images")[0],
        100,
        {id_: Scene(*scene) for id_, scene in truth["dialogues"].items()},
        dialogue_prompt,
    )
    drawn = [*sets.table_1(stories, None), *sets.table_2(dialogues, None)]
    ceilings = {one.name: oracle_ceiling(one, "gill") for one in drawn}
    counted = {"story_1": 0.504, "story_5": 0.820, "story_5_pictures": 1.0}
    counted |= {"dialogue_1": 0.440, "dialogue_5": 0.817, "dialogue_10": 1.0}
    assert ceilings == pytest.approx(counted, abs=5e-4)
