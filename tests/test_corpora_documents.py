"""Interleaved documents in every form, what belongs to a picture, and what can be wrong."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corpora.caption_params import CaptionParams
from corpora.caption_table import CaptionTable
from corpora.captions import CaptionReport, check_captions
from corpora.document_table import DocumentPictures, read_document_table
from corpora.documents import InterleavedDocument, read_documents
from corpora.records import CorpusError, Exclusion
from tests.test_corpora_stories import FIVE, vist


def read(folder: Path, records: list[Any], **given: Any) -> list[InterleavedDocument | Exclusion]:
    path = folder / "documents.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return list(read_documents(str(path), **given))


def parts(document: InterleavedDocument | Exclusion) -> list[str | tuple[str, str]]:
    assert isinstance(document, InterleavedDocument), document
    return [p if isinstance(p, str) else (p.image, p.caption) for p in document.parts]


def test_a_picture_belongs_to_its_caption_or_the_text_before_it_or_after(tmp_path: Path) -> None:
    [document] = read(
        tmp_path,
        [
            [
                {"image": "a.png"},
                {"text": " one \n two"},
                {"text": ""},
                {"image": "b.png", "caption": "own"},
                {"image": "c.png"},
                {"text": "three"},
                {"text": "four"},
                {"image": "d.png"},
            ]
        ],
    )
    assert parts(document) == [
        ("a.png", "one two"),
        "one two",
        ("b.png", "own"),
        ("c.png", "one two"),
        "three four",
        ("d.png", "three four"),
    ]


def test_records_of_obelics_and_mmc4_are_read_as_they_are(tmp_path: Path) -> None:
    obelics = {
        "images": [None, "a.png", None, "b.png"],
        "texts": ["one", None, "two", None],
        "metadata": "[]",
        "general_metadata": "{}",
    }
    mmc4 = {
        "text_list": ["one", "two", "three"],
        "image_info": [
            {"image_name": "b.png", "matched_text_index": 2, "matched_sim": 0.3},
            {"image_name": "a.png", "matched_text_index": 0, "raw_url": "https://x/a.png"},
        ],
        "similarity_matrix": [],
    }
    first, second = read(tmp_path, [obelics, mmc4])
    assert parts(first) == ["one", ("a.png", "one"), "two", ("b.png", "two")]
    assert parts(second) == ["one", ("a.png", "one"), "two three", ("b.png", "three")]


def test_of_a_long_text_a_picture_is_told_the_beginning(tmp_path: Path) -> None:
    [document] = read(tmp_path, [[{"text": "one two three"}, {"image": "a.png"}]], max_chars=9)
    assert parts(document)[1] == ("a.png", "one two")


def test_what_is_wrong_is_said_by_line(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        [
            [],
            [{"text": " "}],
            [{"text": "one"}],
            [{"image": "a.png"}],
            [{"image": "a.png", "caption": "a thing"}],
            "{",
            {"a": 1},
            [{"sound": "x"}],
            {"images": ["a.png"], "texts": []},
            {"text_list": ["one"], "image_info": [{"image_name": "a", "matched_text_index": 1}]},
            {"text_list": ["one"], "image_info": [{"image_name": "", "matched_text_index": 0}]},
            '[{"text": "\\ud800"}, {"image": "a.png"}]',
        ],
    )
    assert [(one.row, getattr(one, "reason", "kept")) for one in found] == [
        ("1", "empty document"),
        ("2", "empty document"),
        ("3", "document without pictures"),
        ("4", "document without text"),
        ("5", "kept"),
        ("6", "not JSON"),
        ("7", "malformed"),
        ("8", "malformed"),
        ("9", "malformed"),
        ("10", "malformed"),
        ("11", "malformed"),
        ("12", "kept"),  # the check of its pictures' captions refuses the letter
    ]
    with pytest.raises(CorpusError, match=r"nowhere\.jsonl: no such file"):
        list(read_documents(str(tmp_path / "nowhere.jsonl")))
    other = tmp_path / "other.json"
    other.write_text("[1]")
    with pytest.raises(CorpusError, match=r"other\.json: neither VIST nor VisDial 1\.0"):
        list(read_documents(str(other)))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place, name in enumerate(["a", "b", "c", *(f"s-{i}" for i in range(5))]):
        Image.new("RGB", (4, 3), (place * 20, 0, 0)).save(folder / f"{name}.png")
    return folder


def test_stories_and_dialogues_are_read_by_their_readers(pictures: Path) -> None:
    stories = pictures.parent / "stories.json"
    stories.write_text(json.dumps(vist({"s": FIVE, "t": FIVE[:3]})))
    short, story = read_documents(str(stories), str(pictures))
    assert isinstance(short, Exclusion)
    assert (short.row, short.reason) == ("t", "incomplete story")
    told = [[text, (str(pictures / f"s-{i}.png"), text)] for i, text in enumerate(FIVE)]
    assert parts(story) == [part for pair in told for part in pair]

    (pictures / "COCO_val_000000000042.png").write_bytes((pictures / "a.png").read_bytes())
    dialogue = {"image_id": 42, "caption": "a thing", "dialog": [{"question": 0, "answer": 0}]}
    data = {"questions": ["is it red"], "answers": ["no"], "dialogs": [dialogue]}
    visdial = pictures.parent / "visdial.json"
    visdial.write_text(json.dumps({"version": "1.0", "split": "val2018", "data": data}))
    [document] = read_documents(str(visdial), str(pictures))
    picture = str(pictures / "COCO_val_000000000042.png")
    assert parts(document) == ["Q: is it red A: no", (picture, "a thing")]


def checked(folder: Path, records: list[Any]) -> CaptionReport:
    table = folder / "captions.tsv"
    table.write_text("caption\timage\nin a table\ta.png\nanother\tb.png\n")
    file = folder / "documents.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    params = CaptionParams(table=str(table), images_dir=str(folder / "pictures"))
    documents = DocumentPictures(params, str(file), str(folder / "pictures"))
    out = folder / "checked" / "captions.parquet"
    return check_captions(params, out, documents=documents)


def test_pictures_of_documents_are_rows_of_a_split_of_their_own(pictures: Path) -> None:
    folder = pictures.parent
    story = [{"text": "one"}, {"image": "a.png"}, {"text": "two"}, {"image": "c.png"}]
    broken = [{"text": "x"}, {"image": "none.png"}, {"text": "y"}, {"image": "c.png"}]
    report = checked(folder, [story, broken, [{"text": "z"}, {"image": "none.png"}], story, []])
    table = CaptionTable(folder / "checked" / "captions.parquet")
    assert [(row.caption, row.split) for row in table] == [
        ("in a table", "train"),
        ("another", "train"),
        ("one", "documents"),
        ("two", "documents"),
        ("y", "documents"),
    ]
    assert table.rows_of_split("documents").tolist() == [2, 3, 4]
    assert Path(table.images([3])[0]).samefile(pictures / "c.png")
    assert read_document_table(folder / "checked" / "documents.jsonl") == [
        ("one", 2, "two", 3),
        ("x y", 4),
        ("one", 2, "two", 3),
    ]
    assert report.splits == {"train": 2, "val": 0, "test": 0, "documents": 3}
    with (folder / "checked" / "captions.excluded.tsv").open() as file:
        excluded = [(row["row"], row["reason"]) for row in csv.DictReader(file, delimiter="\t")]
    assert excluded == [
        ("5", "empty document"),
        ("2", "picture missing"),
        ("3", "picture missing"),
        ("3", "document without pictures"),
    ]


def test_the_rows_of_captions_are_those_without_documents(pictures: Path) -> None:
    folder = pictures.parent
    checked(folder, [[{"text": "one"}, {"image": "a.png"}]])
    out = folder / "checked" / "captions.parquet"
    keys = CaptionTable(out).row_keys()[:2].tobytes()
    table = folder / "captions.tsv"
    check_captions(CaptionParams(table=str(table), images_dir=str(pictures)), out)
    assert CaptionTable(out).row_keys().tobytes() == keys


def test_a_table_behind_a_link_finds_the_pictures_beside_it(pictures: Path) -> None:
    folder = pictures.parent
    deep = folder / "deep" / "deeper"
    deep.mkdir(parents=True)
    (deep / "captions.tsv").write_text("caption\timage\none\ta.png\n")
    (deep / "a.png").write_bytes((pictures / "a.png").read_bytes())
    (folder / "link").symlink_to(deep)
    file = folder / "documents.jsonl"
    file.write_text(json.dumps([{"text": "one"}, {"image": "c.png"}]))
    params = CaptionParams(table=str(folder / "link" / "captions.tsv"))
    out = folder / "checked.parquet"
    check_captions(params, out, documents=DocumentPictures(params, str(file), str(pictures)))
    assert Path(CaptionTable(out).images([1])[0]).samefile(pictures / "c.png")
