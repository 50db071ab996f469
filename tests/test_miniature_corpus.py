"""The drawn data set: readable as the real sets are, honest in its splits, and repeatable."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corpora.caption_sources import open_source
from corpora.captions import CaptionParams, check_captions
from corpora.coco import read_captioned_images
from corpora.parti_prompts import read_prompts
from corpora.visdial import read_dialogues
from corpora.vist import read_stories
from corpora.vqa import read_questions
from miniature.corpus import draw
from miniature.oracle import read_scenes, score
from miniature.world import SPLIT_OF, VALUES, Scene

SIZES = {
    "pictures": 120,
    "captions_per_picture": 2,
    "held_out_pictures": 20,
    "stories": 6,
    "dialogues": 5,
    "prompts": 40,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("miniature") / "corpus"
    assert draw(directory, **SIZES, seed=3) == directory / "captions.tsv"
    return directory


@pytest.fixture(scope="module")
def truth(folder) -> dict:
    return json.loads((folder / "truth.json").read_text())


def all_bytes(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder, tmp_path):
    draw(tmp_path / "again", **SIZES, seed=3)
    draw(tmp_path / "other", **SIZES, seed=4)
    first, again, other = (all_bytes(d) for d in (folder, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert set(first) == set(other)
    assert first["captions.tsv"] != other["captions.tsv"]
    assert first["images/test/000000.png"] != other["images/test/000000.png"]


def test_every_picture_shows_the_scene_that_the_truth_names(folder, truth):
    pictures = truth["pictures"]
    assert len(pictures) == 120 + 2 * 20
    opened = [Image.open(folder / image) for image in pictures]
    assert score(opened, [Scene(*words) for words in pictures.values()])["exact"] == 1.0


def test_the_caption_table_passes_the_check_without_a_complaint(folder, tmp_path):
    params = CaptionParams(table=str(folder / "captions.tsv"))
    report = check_captions(params, tmp_path / "captions.parquet")
    assert (report.kept, report.excluded) == (2 * 160, 0)
    assert report.splits == {"train": 240, "val": 40, "test": 40}
    assert report.pictures_in_several_splits == 0
    assert report.ignored_columns == ()


def test_pictures_of_a_split_show_scenes_of_that_split_only(truth):
    for image, scene in truth["pictures"].items():
        assert image.split("/")[1] == SPLIT_OF[Scene(*scene)]


def test_captions_say_nothing_false_and_held_out_pictures_have_a_complete_one(folder, truth):
    values = {value for options in VALUES.values() for value in options}
    first_captions = {}
    for row in open_source(CaptionParams(table=str(folder / "captions.tsv"))):
        scene = truth["pictures"][row.image]
        assert set(row.caption.strip(".").split()) & values <= set(scene)
        first_captions.setdefault(row.image, row.caption)
    for image, text in first_captions.items():
        if "/train/" not in image:
            assert set(truth["pictures"][image]) <= set(text.strip(".").split())


def test_candidates_are_training_pictures_without_rare_pairs(folder, truth):
    rows = list(open_source(CaptionParams(table=str(folder / "candidates.tsv"))))
    scenes = [Scene(*truth["pictures"][row.image]) for row in rows]
    assert 90 <= len(scenes) < 120
    assert not any(scene.is_rare for scene in scenes)
    assert {SPLIT_OF[scene] for scene in scenes} == {"train"}


def test_stories_end_in_a_held_out_scene_and_their_pictures_are_there(folder, truth):
    stories, report = read_stories(folder / "stories.json", folder / "story_images", "decode")
    assert (report.kept, len(report.excluded)) == (6, 0)
    for one in stories:
        scenes = [Scene(*words) for words in truth["stories"][one.id]]
        pictures = [Image.open(picture.image) for picture in one.pictures]
        np.testing.assert_array_equal(read_scenes(pictures), [scene.codes for scene in scenes])
        assert SPLIT_OF[scenes[-1]] == "test"
        assert all(caption.endswith(".") for caption in one.captions)


def test_dialogues_are_about_held_out_scenes_and_their_pictures_are_there(folder, truth):
    images = folder / "dialogue_images"
    dialogues, report = read_dialogues(folder / "dialogues.json", images_dir=images)
    assert (report.kept, len(report.excluded)) == (5, 0)
    for one in dialogues:
        scene = Scene(*truth["dialogues"][one.id])
        assert SPLIT_OF[scene] == "test"
        assert score([Image.open(one.image)], [scene])["exact"] == 1.0
        assert len(one.rounds) == 10
        assert all(r.candidates[r.gt_index] == r.answer for r in one.rounds)
        assert all(r.question.endswith("?") for r in one.rounds)
        answers = " ".join(r.answer for r in one.rounds)
        assert {scene.color, scene.place, scene.shape, scene.size} <= set(answers.split())


def test_prompts_are_different_and_of_the_kind_they_say(folder, truth):
    prompts = read_prompts(folder / "prompts.tsv")
    assert len({prompt.prompt for prompt in prompts}) == len(truth["prompts"]) == 40
    counts = dict.fromkeys(("Rare pairs", "Common scenes", "Held-out scenes"), 0)
    for prompt, words in zip(prompts, truth["prompts"]):
        scene = Scene(*words)
        assert set(words) <= set(prompt.prompt.strip(".").split())
        assert scene.is_rare == (prompt.category == "Rare pairs")
        if prompt.category != "Rare pairs":
            held_out = prompt.category == "Held-out scenes"
            assert SPLIT_OF[scene] == ("test" if held_out else "train")
        counts[prompt.category] += 1
    assert min(counts.values()) >= 3
    assert counts["Rare pairs"] >= 8


def test_coco_captions_and_questions_read_back(folder, truth):
    images, report = read_captioned_images(folder / "coco_captions.json", folder)
    assert (report.kept, len(report.excluded)) == (20, 0)
    assert all(len(image.captions) == 5 for image in images)
    questions, report = read_questions(
        folder / "questions.json", folder / "annotations.json", folder / "images" / "test"
    )
    assert (report.kept, len(report.excluded)) == (20, 0)
    for question in questions:
        scene = truth["pictures"][str(Path(question.image).relative_to(folder))]
        values = {value for options in VALUES.values() for value in options}
        assert question.answer is not None
        assert set(question.answer.split()) & values <= set(scene)


def test_a_folder_with_something_else_in_it_is_left_alone(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no drawn\.json"):
        draw(tmp_path, **SIZES)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_drawing_again_leaves_nothing_of_the_larger_drawing_before(tmp_path):
    draw(tmp_path / "c", **SIZES)
    draw(tmp_path / "c", **{**SIZES, "pictures": 10})
    assert len(list((tmp_path / "c/images/train").iterdir())) == 10
