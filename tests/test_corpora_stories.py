"""VIST, VisDial and the prompts made of them: the authentic samples, and everything that can be
wrong with such a file."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corpora.prompts import dialogue_prompt, released_dialogue_prompt, story_prompt
from corpora.records import CorpusError, Report
from corpora.visdial import read_dialogues
from corpora.vist import read_stories


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def reasons(report: Report) -> list[tuple[str, str]]:
    return [(exclusion.row, exclusion.reason) for exclusion in report.excluded]


# ---- prompts --------------------------------------------------------------------------------


def test_prompts() -> None:
    assert story_prompt(["we went out .", "it rained ."]) == "we went out . it rained ."
    assert story_prompt([]) == ""
    rounds = [("is it red", "no"), ("is it big", "yes")]
    assert dialogue_prompt(rounds) == "Q: is it red A: no\nQ: is it big A: yes"
    assert dialogue_prompt(rounds[:1]) == "Q: is it red A: no"
    assert released_dialogue_prompt(rounds) == "Q: is it red?\nA: no\nQ: is it big?\nA: yes"


# ---- VIST -----------------------------------------------------------------------------------


def vist(stories: dict[str, list[str]]) -> dict[str, Any]:
    """A file with these sentences; photo ids are STORY-ORDER."""
    sentences = [
        {
            "story_id": story,
            "worker_arranged_photo_order": order,
            "photo_flickr_id": f"{story}-{order}",
            "text": text,
            "storylet_id": f"{story}{order}",
            "tier": "story-in-sequence",
        }
        for story, texts in stories.items()
        for order, text in enumerate(texts)
    ]
    images = [{"id": sentence["photo_flickr_id"]} for sentence in sentences]
    return {"images": images, "albums": [], "annotations": [[one] for one in sentences]}


FIVE = ["one .", "two .", "three .", "four .", "five ."]


def test_vist_sample(shared_data: Path) -> None:
    path = shared_data / "vist/reconstructed_test_500.story-in-sequence.json"
    stories, report = read_stories(path)
    assert (len(stories), report.kept, report.excluded) == (500, 500, ())
    story = stories[0]
    assert story.id == "45530"
    assert [picture.id for picture in story.pictures] == [
        "1741642",
        "1741640",
        "1741632",
        "1741622",
        "1741587",
    ]
    assert story.captions[0] == "the local parish holds a craft show each year ."
    assert story.pictures[0].image is None
    assert all(len(story.pictures) == 5 for story in stories)
    assert len({picture.id for story in stories for picture in story.pictures}) <= 796
    prompt = story_prompt(story.captions)
    assert prompt.startswith("the local parish holds a craft show each year . lots of folks")


def test_vist_authentic_record_is_one_fifth_of_a_story(shared_data: Path) -> None:
    path = shared_data / "vist/authentic_one_record.json"
    with pytest.raises(CorpusError, match=r"row 45530: incomplete story \(1 of 5 sentences\)"):
        read_stories(path)


def test_vist_order_is_the_workers_not_the_files(tmp_path: Path) -> None:
    content = vist({"1": FIVE, "2": FIVE})
    content["annotations"] = content["annotations"][::-1]
    content["annotations"][0][0]["worker_arranged_photo_order"] = "4"  # a string, as some are
    stories, _ = read_stories(written(tmp_path / "vist.json", content))
    assert [story.id for story in stories] == ["2", "1"]
    assert [story.captions for story in stories] == [tuple(FIVE)] * 2


def test_vist_faults_are_reported_and_cost_their_story(tmp_path: Path) -> None:
    names = ["good", "lost", "short", "twice", "dii", "double", "photo", "number", "list"]
    content = vist(dict.fromkeys(names, FIVE))
    sentence = {
        name: [one for one in content["annotations"] if one[0]["story_id"] == name]
        for name in names
    }
    del sentence["lost"][3][0]["text"]
    content["annotations"].remove(sentence["short"][4])
    sentence["twice"][1][0]["worker_arranged_photo_order"] = 0
    sentence["dii"][0][0]["tier"] = "descriptions-in-isolation"
    sentence["double"][2][0]["storylet_id"] = sentence["double"][1][0]["storylet_id"]
    content["images"] = [one for one in content["images"] if one["id"] != "photo-2"]
    sentence["number"][0][0]["text"] = 7
    sentence["list"][0].append({})
    place = {
        name: content["annotations"].index(sentence[name][order])
        for name, order in (
            ("lost", 3),
            ("dii", 0),
            ("double", 2),
            ("photo", 2),
            ("number", 0),
            ("list", 0),
        )
    }
    stories, report = read_stories(written(tmp_path / "vist.json", content))
    assert [story.id for story in stories] == ["good"]
    assert reasons(report) == [
        (f"annotations[{place['lost']}]", "missing field"),
        (f"annotations[{place['dii']}]", "wrong tier"),
        (f"annotations[{place['double']}]", "duplicate id"),
        (f"annotations[{place['photo']}]", "unknown photo"),
        (f"annotations[{place['number']}]", "missing field"),
        (f"annotations[{place['list']}]", "malformed"),
        ("lost", "incomplete story"),
        ("short", "incomplete story"),
        ("twice", "ambiguous order"),
        ("dii", "incomplete story"),
        ("double", "incomplete story"),
        ("photo", "incomplete story"),
        ("number", "incomplete story"),
        ("list", "incomplete story"),
    ]
    assert report.excluded[0].detail == "story lost: text"
    assert report.reasons["incomplete story"] == 7
    assert str(report).startswith(f"{tmp_path}/vist.json: 1 kept, 14 excluded: incomplete story 7")


def test_vist_stories_with_a_dead_picture_are_left_out(tmp_path: Path) -> None:
    content = vist({"good": FIVE, "gone": FIVE, "html": FIVE})
    folder = tmp_path / "images"
    folder.mkdir()
    for place, image in enumerate(content["images"]):
        suffix = (".jpg", ".png", ".gif", ".JPG", ".webp")[place % 5]
        Image.new("RGB", (2, 2)).save(folder / f"{image['id']}{suffix}")
    (folder / "gone-4.webp").unlink()
    (folder / "html-0.jpg").write_text("<html>This photo is no longer available</html>")
    path = written(tmp_path / "vist.json", content)
    stories, report = read_stories(path, folder)
    assert [story.id for story in stories] == ["good"]
    assert [picture.image for picture in stories[0].pictures] == [
        f"{folder}/good-{order}{suffix}"
        for order, suffix in enumerate((".jpg", ".png", ".gif", ".JPG", ".webp"))
    ]
    assert reasons(report) == [("gone", "picture missing"), ("html", "picture unreadable")]
    assert "gone-4" in report.excluded[0].detail
    stories, _ = read_stories(path, folder, check="exists")
    assert [story.id for story in stories] == ["good", "html"]
    with pytest.raises(CorpusError, match="no such folder of pictures"):
        read_stories(path, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": []}', "not a VIST story-in-sequence file: it has no list 'annotations'"),
        ("[]", "not a VIST story-in-sequence file: it has no list 'images'"),
        ('{"images": [], "annotations": []}', "nothing to keep"),
        ('{"images": [', r"not a JSON file \(Expecting value: line 1 column 13"),
        ("\xff", "not a JSON file"),
        ("", "not a JSON file"),
    ],
)
def test_vist_files_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "vist.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CorpusError, match=message):
        read_stories(path)
    with pytest.raises(CorpusError, match="no such file"):
        read_stories(tmp_path / "no.json")


# ---- VisDial --------------------------------------------------------------------------------

VISDIAL: dict[str, Any] = {
    "version": "1.0",
    "split": "val2018",
    "data": {
        "questions": ["is it red", "is it big"],
        "answers": ["no", "yes", "maybe"],
        "dialogs": [
            {
                "image_id": image_id,
                "caption": "a thing",
                "dialog": [
                    {"question": 0, "answer": 1, "gt_index": 0, "answer_options": [1, 0]},
                    {"question": 1, "answer": 2, "gt_index": 2, "answer_options": [0, 1, 2]},
                ],
            }
            for image_id in range(100, 120)
        ],
    },
}


@pytest.fixture
def content() -> dict[str, Any]:
    return copy.deepcopy(VISDIAL)


def test_visdial_sample(shared_data: Path) -> None:
    folder = shared_data / "visdial"
    dialogues, report = read_dialogues(
        folder / "visdial_1.0_val_crowdsourced.json",
        folder / "visdial_1.0_val_dense_annotations_crowdsourced.json",
    )
    assert (len(dialogues), report.kept, report.excluded) == (97, 97, ())
    dialogue = dialogues[0]
    assert (dialogue.id, dialogue.image) == ("239030", None)
    assert dialogue.caption == "a nokia tablet pc in a keyboard dock"
    assert dialogue.questions_and_answers[:2] == (
        ("what color is the tablet", "black and silver"),
        ("is it on a desk", "no"),
    )
    assert released_dialogue_prompt(dialogue.questions_and_answers[:1]) == (
        "Q: what color is the tablet?\nA: black and silver"
    )
    rounds = [one for dialogue in dialogues for one in dialogue.rounds]
    assert len(rounds) == 970
    assert all(len(one.candidates) == 100 for one in rounds)
    assert all(one.candidates[one.gt_index or 0] == one.answer for one in rounds)
    annotated = [one for one in rounds if one.relevance is not None]
    assert len(annotated) == 97
    assert dialogue.rounds[5].relevance is not None  # round 6, counted from 1
    assert dialogue.rounds[5].relevance[dialogue.rounds[5].gt_index or 0] == 1.0


def test_visdial_round_by_round(tmp_path: Path, content: dict[str, Any]) -> None:
    content["data"]["dialogs"] = content["data"]["dialogs"][:1]
    dense = [{"image_id": 100, "round_id": 2, "gt_relevance": [0, 0.5, 1]}]
    (dialogue,), report = read_dialogues(
        written(tmp_path / "visdial.json", content), written(tmp_path / "dense.json", dense)
    )
    assert report.excluded == ()
    first, second = dialogue.rounds
    assert (first.question, first.answer, first.gt_index) == ("is it red", "yes", 0)
    assert (first.candidates, first.relevance) == (("yes", "no"), None)
    assert second.relevance == (0.0, 0.5, 1.0)


def test_visdial_faults_are_reported_with_their_dialogue(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    records = content["data"]["dialogs"]
    del records[1]["caption"]
    records[2]["image_id"] = 100
    records[3]["dialog"] = []
    records[4]["dialog"][0]["question"] = 2
    records[5]["dialog"][0]["answer"] = -1
    records[6]["dialog"][1]["gt_index"] = 0
    records[7]["dialog"][1]["gt_index"] = 3
    del records[8]["dialog"][1]["answer"]  # as in the test split
    records[9]["dialog"][1]["answer_options"][0] = 99
    records[10] = "a dialogue"
    del records[11]["image_id"]
    del records[12]["dialog"][0]["gt_index"]
    records[13]["dialog"][0] = None
    records[14]["dialog"][0]["question"] = "1"
    for one in records[15]["dialog"]:  # a file without candidates is fine
        del one["answer_options"], one["gt_index"]
    dialogues, report = read_dialogues(written(tmp_path / "visdial.json", content))
    assert [dialogue.id for dialogue in dialogues] == ["100", *map(str, range(114, 120))]
    assert dialogues[1].rounds[0].question == "is it big"
    assert dialogues[2].rounds[0].candidates == ()
    assert reasons(report) == [
        ("101", "missing field"),
        ("100", "duplicate id"),
        ("103", "missing field"),
        ("104", "bad index"),
        ("105", "bad index"),
        ("106", "bad index"),
        ("107", "bad index"),
        ("108", "missing field"),
        ("109", "bad index"),
        ("dialogs[10]", "missing field"),
        ("dialogs[11]", "missing field"),
        ("112", "missing field"),
        ("113", "malformed"),
    ]
    assert report.excluded[7].detail == "round 2: answer"
    assert report.kept + len(report.excluded) == 20


def test_visdial_dense_annotations_that_fit_nothing(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    dense: list[Any] = [
        {"image_id": 100, "round_id": 1, "gt_relevance": [0.0, 1.0]},
        {"image_id": 101, "round_id": 0, "gt_relevance": [0.0, 1.0]},
        {"image_id": 102, "round_id": 3, "gt_relevance": [0.0, 1.0]},
        {"image_id": 103, "round_id": 1, "gt_relevance": [0.0]},
        {"image_id": 104, "round_id": 1, "gt_relevance": [0.0, 1.5]},
        {"image_id": 9, "round_id": 1, "gt_relevance": [0.0, 1.0]},
        "annotation",
        {"image_id": 105, "round_id": 1, "relevance": [0.4, 1.0]},  # as in the train file
    ]
    dialogues, report = read_dialogues(
        written(tmp_path / "visdial.json", content), written(tmp_path / "dense.json", dense)
    )
    assert report.kept == 20
    assert reasons(report) == [
        ("101", "bad index"),
        ("102", "bad index"),
        ("103", "bad relevance"),
        ("104", "bad relevance"),
        ("9", "unknown dialogue"),
        ("[6]", "unknown dialogue"),
    ]
    assert {exclusion.file for exclusion in report.excluded} == {str(tmp_path / "dense.json")}
    annotated = {d.id: d.rounds[0].relevance for d in dialogues if d.rounds[0].relevance}
    assert annotated == {"100": (0.0, 1.0), "105": (0.4, 1.0)}
    with pytest.raises(CorpusError, match="not a file of dense annotations"):
        read_dialogues(tmp_path / "visdial.json", tmp_path / "visdial.json")


def test_visdial_pictures_by_their_coco_id(tmp_path: Path, content: dict[str, Any]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(folder / "VisualDialog_val2018_000000000100.jpg")
    Image.new("RGB", (2, 2)).save(folder / "000000000101.jpg")
    (folder / "VisualDialog_val2018_000000000102.jpg").touch()
    dialogues, report = read_dialogues(written(tmp_path / "v.json", content), images_dir=folder)
    assert [(dialogue.id, Path(dialogue.image or "").name) for dialogue in dialogues] == [
        ("100", "VisualDialog_val2018_000000000100.jpg"),
        ("101", "000000000101.jpg"),
    ]
    assert report.reasons == {"picture missing": 17, "picture empty": 1}


def test_visdial_wrong_versions_are_named(tmp_path: Path, content: dict[str, Any]) -> None:
    for version in ("0.9", None, 1.0):
        content["version"] = version
        with pytest.raises(CorpusError, match=f"expected VisDial version '1.0', found {version!r}"):
            read_dialogues(written(tmp_path / "visdial.json", content))
    with pytest.raises(CorpusError, match="found None"):
        read_dialogues(written(tmp_path / "list.json", []))
    content |= {"version": "1.0", "data": {"questions": [], "answers": []}}
    with pytest.raises(CorpusError, match="no list 'dialogs'"):
        read_dialogues(written(tmp_path / "visdial.json", content))


# ---- as others keep them --------------------------------------------------------------------


def marked(path: Path, content: Any) -> Path:
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    return path


def test_vist_pictures_in_folders_and_ids_as_numbers(tmp_path: Path) -> None:
    content = vist({"7": FIVE})
    names = [image["id"] for image in content["images"]]
    for place, name in enumerate(names):
        folder = tmp_path / "images" / ("train" if place % 2 else "train/deep")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / f"{name}.jpg")
    (tmp_path / "images/train/up").symlink_to(tmp_path / "images")
    content["annotations"] = [
        [{**one, "story_id": 7.0, "worker_arranged_photo_order": str(order)}]
        for order, [one] in enumerate(content["annotations"])
    ]
    [story], report = read_stories(marked(tmp_path / "v.json", content), tmp_path / "images")
    assert (story.id, report.excluded) == ("7", ())
    assert story.pictures[1].image == f"{tmp_path}/images/train/7-1.jpg"


def test_visdial_ids_as_texts_and_names(tmp_path: Path, content: dict[str, Any]) -> None:
    folder = tmp_path / "images/val"
    folder.mkdir(parents=True)
    dialogs = content["data"]["dialogs"][:3]
    for dialog, id_, name in zip(
        dialogs,
        ("000000000100", 101.0, "living_room"),
        ("VisualDialog_val2018_000000000100.jpg", "000000000101.JPEG", "living_room.webp"),
    ):
        dialog["image_id"] = id_
        Image.new("RGB", (2, 2)).save(folder / name)
    content["data"]["dialogs"] = dialogs
    dense = [{"image_id": "living_room", "round_id": 1, "gt_relevance": [0.0, 1.0]}]
    dialogues, report = read_dialogues(
        marked(tmp_path / "v.json", content), marked(tmp_path / "d.json", dense), folder.parent
    )
    assert [dialogue.id for dialogue in dialogues] == ["100", "101", "living_room"]
    assert [Path(dialogue.image or "").parent.name for dialogue in dialogues] == ["val"] * 3
    assert dialogues[2].rounds[0].relevance == (0.0, 1.0)
    assert report.excluded == ()
