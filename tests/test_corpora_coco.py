"""The sets built on COCO's pictures and on the web's: COCO captions, VQAv2, CC3M."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corpora.cc3m import write_url_list
from corpora.coco import read_captioned_images
from corpora.pictures import open_picture
from corpora.records import CorpusError, Report
from corpora.vqa import read_questions


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def reasons(report: Report) -> list[tuple[str, str]]:
    return [(exclusion.row, exclusion.reason) for exclusion in report.excluded]


# ---- COCO captions --------------------------------------------------------------------------


def test_coco_sample(shared_data: Path) -> None:
    folder = shared_data / "coco_mini_train"
    images, report = read_captioned_images(
        folder / "captions_train2017.json", folder / "images", check="decode"
    )
    assert (len(images), report.kept, report.excluded) == (80, 80, ())
    assert sum(len(image.captions) for image in images) == 400
    assert images[0].id == "493652"
    assert images[0].captions[0] == "Living room decorated for Christmas with gifts galore"
    assert open_picture(images[0].image or "").size == (640, 399)


def test_coco_2014_annotations_fit_either_release(tmp_path: Path) -> None:
    content = {
        "images": [
            {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
            {"id": 43, "file_name": "COCO_val2014_000000000043.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 43, "caption": "second"},
            {"id": 2, "image_id": 42, "caption": " first\n of two "},
            {"id": 3, "image_id": 42, "caption": "other"},
        ],
    }
    for prefix in ("COCO_val2014_", ""):
        folder = tmp_path / f"images{prefix}"
        folder.mkdir()
        for number in (42, 43, 142):
            Image.new("RGB", (number, 2)).save(folder / f"{prefix}{number:012d}.jpg")
        images, _ = read_captioned_images(written(tmp_path / "c.json", content), folder)
        assert [(image.id, image.captions) for image in images] == [
            ("42", ("first of two", "other")),
            ("43", ("second",)),
        ]
        assert [open_picture(image.image or "").width for image in images] == [42, 43]


def test_coco_names_that_are_not_coco_s_are_taken_literally(tmp_path: Path) -> None:
    """Another data set in COCO's format: cat_2 is no stand-in for dog_2 because both end in 2."""
    (tmp_path / "images/deep").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "images/deep/dog_9.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "images/cat_2.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "secret_3.png")
    names = {1: "deep/dog_9.png", 2: "dog_2.png", 3: "../secret_3.png", 4: "/etc/passwd"}
    content = {
        "images": [{"id": id_, "file_name": name} for id_, name in names.items()],
        "annotations": [{"id": id_, "image_id": id_, "caption": "x"} for id_ in names],
    }
    images, report = read_captioned_images(
        written(tmp_path / "c.json", content), tmp_path / "images"
    )
    assert [image.image for image in images] == [f"{tmp_path}/images/deep/dog_9.png"]
    assert reasons(report) == [(row, "picture missing") for row in ("2", "3", "4")]


def test_coco_faults_are_reported(tmp_path: Path) -> None:
    content = {
        "images": [
            {"id": 1, "file_name": "1.jpg"},
            {"id": 2, "file_name": "2.jpg"},
            {"id": 2, "file_name": "2.jpg"},
            {"file_name": "a.jpg"},
            {"id": 3, "file_name": "3.jpg"},
            "image",
            {"id": 4},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "kept"},
            {"id": 1, "image_id": 1, "caption": "same id"},
            {"id": 2, "image_id": 9, "caption": "no such image"},
            {"id": 3, "image_id": 2, "caption": "  "},
            {"id": 4, "image_id": 2},
            {"image_id": 3, "caption": "no id"},
            None,
        ],
    }
    images, report = read_captioned_images(written(tmp_path / "c.json", content))
    assert [(image.id, image.image, image.captions) for image in images] == [("1", None, ("kept",))]
    assert reasons(report) == [
        ("images[2]", "duplicate id"),
        ("images[3]", "missing field"),
        ("images[5]", "missing field"),
        ("images[6]", "missing field"),
        ("annotations[1]", "duplicate id"),
        ("annotations[2]", "unknown image"),
        ("annotations[3]", "no caption"),
        ("annotations[4]", "missing field"),
        ("annotations[5]", "missing field"),
        ("annotations[6]", "missing field"),
        ("2", "image without captions"),
        ("3", "image without captions"),
    ]


def test_an_instances_file_is_no_captions_file(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}],
    }
    with pytest.raises(CorpusError, match=r"nothing to keep .*: missing field 1, image w"):
        read_captioned_images(written(tmp_path / "instances.json", content))


# ---- VQAv2 ----------------------------------------------------------------------------------


def test_vqa_sample(shared_data: Path) -> None:
    folder = shared_data / "vqa_v2"
    questions, report = read_questions(
        folder / "questions_2962.json", folder / "annotations_2962.json"
    )
    assert (len(questions), report.kept, report.excluded) == (2962, 2962, ())
    assert all(len(question.answers) == 10 for question in questions)
    types = [question.answer_type for question in questions]
    assert {kind: types.count(kind) for kind in set(types)} == {
        "yes/no": 1020,
        "other": 976,
        "number": 966,
    }
    first = questions[0]
    assert (first.id, first.image_id, first.image) == ("540769000", "540769", None)
    assert first.question == "Is there a bell on the train?"
    assert (first.answer, first.question_type) == ("yes", "is there a")


def test_vqa_with_pictures(shared_data: Path) -> None:
    folder = shared_data / "vqa_v2/with_images"
    questions, report = read_questions(
        folder / "questions_39.json",
        folder / "annotations_39.json",
        shared_data / "coco_mini_train/images",
    )
    assert report.excluded == ()
    assert len(questions) == 39
    assert len({question.image for question in questions}) == 25
    assert Path(questions[0].image or "").name == "000000100667.jpg"


def test_vqa_without_annotations_and_with_missing_pictures(
    shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "vqa_v2/with_images"
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(shared_data / "coco_mini_train/images/000000100667.jpg", images)
    questions, report = read_questions(folder / "questions_39.json", images_dir=images)
    assert {question.image_id for question in questions} == {"100667"}
    assert all(question.answers == () and question.answer is None for question in questions)
    assert report.reasons == {"picture missing": 39 - len(questions)}


def test_vqa_faults_are_reported(tmp_path: Path) -> None:
    def annotation(id_: int, **changes: Any) -> dict[str, Any]:
        answers = [{"answer_id": 1, "answer": "yes"}, {"answer_id": 2, "answer": "no"}]
        full = {"question_id": id_, "image_id": 7, "answers": answers}
        return full | {"multiple_choice_answer": "yes"} | changes

    asked = {
        "questions": [
            *({"question_id": id_, "image_id": 7, "question": f"is it {id_}?"} for id_ in range(7)),
            {"question_id": 0, "image_id": 7, "question": "again?"},
            {"question_id": 8, "image_id": 7, "question": ""},
            {"question_id": 9, "question": "of what?"},
            17,
        ]
    }
    answered = {
        "annotations": [
            annotation(0),
            annotation(1, image_id=8),
            annotation(2, answers=[]),
            annotation(3, answers=[{"answer_id": 1}]),
            annotation(4, multiple_choice_answer=None),
            annotation(0),
            annotation(99),
            None,
        ]
    }
    path, annotations = tmp_path / "q.json", tmp_path / "a.json"
    questions, report = read_questions(written(path, asked), written(annotations, answered))
    assert [(question.id, question.answers) for question in questions] == [("0", ("yes", "no"))]
    assert [(Path(one.file).name, one.row, one.reason) for one in report.excluded] == [
        ("a.json", "2", "missing field"),
        ("a.json", "3", "missing field"),
        ("a.json", "4", "missing field"),
        ("a.json", "0", "duplicate id"),
        ("a.json", "annotations[7]", "missing field"),
        ("q.json", "1", "different images"),
        *(("q.json", str(id_), "question without annotation") for id_ in (2, 3, 4, 5, 6)),
        ("q.json", "0", "duplicate id"),
        ("q.json", "8", "missing field"),
        ("q.json", "9", "missing field"),
        ("q.json", "questions[10]", "missing field"),
        ("a.json", "99", "annotation without question"),
    ]
    with pytest.raises(CorpusError, match="not a VQA annotations file: it has no list"):
        read_questions(path, path)


# ---- CC3M -----------------------------------------------------------------------------------


def test_cc3m_list_for_the_downloader(tmp_path: Path) -> None:
    source, out = tmp_path / "Train_GCC-training.tsv", tmp_path / "urls.tsv"
    source.write_bytes(
        b"a very typical bus station\thttp://lh6.example.com/a.jpg\r\n"
        b'the "quoted"  one\thttps://example.com/b.jpg?x=1\n'
        b"a very typical bus station\thttp://lh6.example.com/a.jpg\n"
        b"no address\n"
        b"\thttp://example.com/c.jpg\n"
        b"a file\tfile:///etc/passwd\n"
        b"latin \xe9\thttp://example.com/d.jpg\n"
        b"the last\thttp:///e.jpg"
    )
    report = write_url_list(source, out)
    assert out.read_text() == (
        "caption\turl\n"
        "a very typical bus station\thttp://lh6.example.com/a.jpg\n"
        'the "quoted" one\thttps://example.com/b.jpg?x=1\n'
    )
    assert report.kept == 2
    assert reasons(report) == [
        ("3", "duplicate"),
        ("4", "wrong number of columns"),
        ("5", "no caption"),
        ("6", "no address"),
        ("7", "bad encoding"),
        ("8", "no address"),
    ]


def test_cc3m_files_that_cannot_be_used(tmp_path: Path) -> None:
    source, out = tmp_path / "cc3m.tsv", tmp_path / "urls.tsv"
    with pytest.raises(CorpusError, match="no such file"):
        write_url_list(source, out)
    source.write_text("caption\timage\n")
    with pytest.raises(CorpusError, match="nothing to keep in .* no address 1"):
        write_url_list(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cc3m.tsv"]


# ---- as others keep them --------------------------------------------------------------------


def test_coco_and_vqa_ids_as_texts_and_pictures_in_folders(tmp_path: Path) -> None:
    folder = tmp_path / "images/val2014"
    folder.mkdir(parents=True)
    for name in ("COCO_val2014_000000000042.jpg", "living_room.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    content = {
        "images": [
            {"id": "42", "file_name": "COCO_val2014_000000000042.jpg"},
            {"id": "room", "file_name": "other\\living_room.png"},
        ],
        "annotations": [
            {"id": "a", "image_id": 42.0, "caption": "first"},
            {"id": "b", "image_id": "room", "caption": "second"},
        ],
    }
    path = tmp_path / "c.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    images, report = read_captioned_images(path, tmp_path / "images")
    assert [(image.id, Path(image.image or "").name) for image in images] == [
        ("42", "COCO_val2014_000000000042.jpg"),
        ("room", "living_room.png"),
    ]
    assert report.excluded == ()
    questions = {
        "questions": [
            {"question_id": "q1", "image_id": "000042", "question": "is it?"},
            {"question_id": 2, "image_id": "living_room", "question": "is it?"},
        ]
    }
    answered = {
        "annotations": [
            {"question_id": "q1", "image_id": 42, "multiple_choice_answer": "yes"},
            {"question_id": "2", "image_id": "living_room", "multiple_choice_answer": "no"},
        ]
    }
    for annotation in answered["annotations"]:
        annotation["answers"] = [{"answer": "yes"}]  # type: ignore[assignment]
    found, report = read_questions(
        written(tmp_path / "q.json", questions),
        written(tmp_path / "a.json", answered),
        tmp_path / "images",
    )
    assert [(one.id, one.image_id, one.answer) for one in found] == [
        ("q1", "42", "yes"),
        ("2", "living_room", "no"),
    ]
    assert report.excluded == ()


def test_a_name_in_another_case_is_found_where_one_file_fits(tmp_path: Path) -> None:
    images = tmp_path / "images/deep"
    images.mkdir(parents=True)
    for name in ("a.JPG", "b.JPG", "B.jpg"):
        Image.new("RGB", (4, 3)).save(images / name)
    names = {1: "A.jpg", 2: "b.jpg"}
    content = {
        "images": [{"id": id_, "file_name": name} for id_, name in names.items()],
        "annotations": [{"id": id_, "image_id": id_, "caption": "x"} for id_ in names],
    }
    kept, report = read_captioned_images(written(tmp_path / "c.json", content), tmp_path / "images")
    assert [Path(row.image or "").name for row in kept] == ["a.JPG"]
    assert [reason for _, reason in reasons(report)] == ["picture missing"]
