"""Captioned pictures as other programs write them: each form is read as what it says, or refused
with the row, or the header, and the setting that decides."""

from __future__ import annotations

import csv
import gzip
import http.server
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from corpora.caption_params import CaptionParams
from corpora.caption_report import REMEDIES, CaptionReport
from corpora.caption_sources import open_source
from corpora.captions import CaptionTable, check_captions
from corpora.picture_errors import PictureErrorKind
from corpora.pictures import PICTURE_SUFFIXES, open_picture
from corpora.records import CaptionTableError, Exclusion
from corpora.source_rows import SourceRow

NAMES = "abcdefgh"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tables, with pictures in img/ that differ by their red."""
    images = tmp_path / "tables/img"
    images.mkdir(parents=True)
    for place, name in enumerate(NAMES):
        Image.new("RGB", (4, 3), (place * 20, 0, 0)).save(images / f"{name}.png")
    return tmp_path / "tables"


def read(table: Path | str, **params: Any) -> list[SourceRow | Exclusion]:
    return list(open_source(CaptionParams(table=str(table), **params)))


def captions(table: Path | str, **params: Any) -> list[str]:
    rows = read(table, **params)
    assert all(isinstance(row, SourceRow) for row in rows), rows
    return [row.caption for row in rows]  # type: ignore[union-attr]


def check(table: Path | str, out: Path, **params: Any) -> CaptionReport:
    return check_captions(CaptionParams(table=str(table), **params), out, workers=1)


def written(folder: Path, content: str | bytes, name: str = "table.tsv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- quotation marks ------------------------------------------------------------------------

HARD = ['a sign that says "STOP"', "two lines\nof caption", "tab\there", '"hi" he said', "plain"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
def test_what_the_csv_module_quoted_is_read_as_it_was(
    folder: Path, quoting: Any, delimiter: str
) -> None:
    with (folder / "t.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([("caption", "image"), *((text, "img/a.png") for text in HARD)])
    assert captions(folder / "t.tsv") == HARD
    rows = read(folder / "t.tsv")
    assert [row.row for row in rows] == [2, 3, 5, 6, 7], "the line at which a row begins"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from('ab "\t\n,;'), max_size=8), min_size=1, max_size=6))
def test_a_table_of_the_csv_module_is_read_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    """No caption of any such table is ever another than what was written."""
    path = tmp_path_factory.mktemp("t") / "t.tsv"
    for delimiter in "\t,":
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([("caption", "image"), *((text, "a.png") for text in texts)])
        try:
            found = captions(path)
        except CaptionTableError as error:
            found = texts if "captions.quoting" in str(error) else [str(error)]
        assert found == texts


@pytest.mark.parametrize(
    "lines",
    [
        ['a "big" dog', '"x', 'the " end "'],
        ['" love is all "', 'a 12" pizza'],
        ['"never closed', "another row", 'closed here" and on', "a row"],
        # Either two rows or a cell of two lines: the last row decides.
        ['"opened', 'closed"', 'a "word"'],
    ],
)
def test_a_tsv_that_quotes_nothing_is_literal(folder: Path, lines: list[str]) -> None:
    text = "caption\timage\n" + "".join(f"{line}\timg/a.png\n" for line in lines)
    assert captions(written(folder, text)) == lines


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['"opened', 'closed"'], "line 2 has quotation marks around a cell, others not"),
        (['" the end "', "a dog"], "line 2 has quotation marks around a cell, others not"),
        (['"all of it"', "a dog"], "line 2 has quotation marks around a cell, others not"),
        (['a "big" dog', '"say ""hi"""'], "line 3 .* but line 2 has one that is text"),
        (['a 12" pizza', '"two\nlines"'], "line 3 .* but line 2 has one that is text"),
    ],
)
def test_marks_that_may_be_either_are_refused_with_the_row_and_the_setting(
    folder: Path, lines: list[str], message: str
) -> None:
    table = written(folder, "caption\timage\n" + "".join(f"{x}\timg/a.png\n" for x in lines))
    with pytest.raises(CaptionTableError, match=f"{message}.*captions.quoting: quoted.*literal"):
        read(table)
    literal = [row for row in read(table, quoting="literal") if isinstance(row, SourceRow)]
    assert literal[0].caption == lines[0]
    assert all(isinstance(row, SourceRow) for row in read(table, quoting="quoted"))


def test_excel_quotes_commas_in_text_with_tabs(folder: Path) -> None:
    table = written(folder, 'caption\timage\r\n"a dog, a cat"\timg/a.png\r\na hen\timg/b.png\r\n')
    assert captions(table) == ["a dog, a cat", "a hen"]


def test_r_writes_row_names_and_quotes_all_text(folder: Path) -> None:
    text = '"caption"\t"image"\n"1"\t"a dog"\t"img/a.png"\n"2"\t"a ""big"" cat"\t"img/b.png"\n'
    assert captions(written(folder, text)) == ["a dog", 'a "big" cat']
    escaped = '"caption"\t"image"\n"1"\t"a \\"big\\" cat"\t"img/b.png"\n'
    with pytest.raises(CaptionTableError, match="captions.quoting.*likely escaped"):
        read(written(folder, escaped))
    assert captions(folder / "table.tsv", quoting="escaped") == ['a "big" cat']


def test_r_writes_row_names_without_quotation_marks_too(folder: Path) -> None:
    table = written(folder, 'caption\timage\n1\ta "big" dog\timg/a.png\n2\ta cat\timg/b.png\n')
    assert captions(table) == ['a "big" dog', "a cat"]
    table = written(folder, "caption\timage\n1\tof 3\timg/a.png\na cat\timg/b.png\n")
    assert [type(row) for row in read(table)] == [Exclusion, SourceRow], "a tab in a caption"


def test_a_mark_that_is_never_closed_costs_its_rows_and_says_so(folder: Path) -> None:
    table = written(folder, 'caption\timage\na dog\timg/a.png\n"a cat\timg/b.png\n')
    rows = read(table, quoting="quoted")
    assert isinstance(rows[0], SourceRow)
    assert [(r.row, r.reason) for r in rows[1:]] == [("3", "broken quoting")]  # type: ignore[union-attr]


# ---- encodings and line ends ----------------------------------------------------------------

TABLE = "caption\timage\nein Mädchen 🐶\timg/a.png\nzwei\timg/b.png\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("zipped", [False, True])
def test_unicode_with_any_line_end(folder: Path, encoding: str, end: str, zipped: bool) -> None:
    data = TABLE.replace("\n", end).encode(encoding)
    table = written(folder, gzip.compress(data) if zipped else data)
    assert captions(table) == ["ein Mädchen 🐶", "zwei"]
    table = written(folder, gzip.compress(data) if zipped else data, "t.csv.gz")
    assert captions(table) == ["ein Mädchen 🐶", "zwei"]


def test_another_encoding_is_refused_with_the_byte_and_the_setting(folder: Path) -> None:
    rows = "caption\timage\n" + "a dog\timg/a.png\n" * 5000 + "ein Mädchen\timg/b.png\n"
    data = rows.encode("cp1252")
    place = data.index(b"\xe4")
    for table in (written(folder, data), written(folder, gzip.compress(data), "t.tsv.gz")):
        with pytest.raises(CaptionTableError, match=f"byte {place} .*captions.encoding"):
            read(table)
        assert captions(table, encoding="cp1252")[-1] == "ein Mädchen"
    with pytest.raises(CaptionTableError, match="captions.encoding: no encoding is called latin9"):
        read(written(folder, data), encoding="latin9x")


def test_a_line_feed_ends_a_line_where_there_is_one(folder: Path) -> None:
    table = written(folder, "caption\timage\na dog\rand more\timg/a.png\n")
    assert captions(table) == ["a dog and more"]


# ---- columns --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        *("Caption,IMAGE", "text,image_path", "TITLE,filepath", "caption,File Name"),
        *("text,file_name", "title,path", "caption,text,image,path", "note,caption,image"),
        *("captions,jpg", "txt,PNG", "note,txt,webp"),
    ],
)
def test_names_that_people_use(folder: Path, header: str) -> None:
    cells = {"caption": "a dog", "image": "img/a.png"}
    names = header.split(",")
    plain = {name: name.lower().replace(" ", "_") for name in names}
    value = {
        name: cells["caption"]
        if plain[name] == "caption"
        or (plain[name] in ("captions", "text", "title", "txt") and "caption" not in names)
        else cells["image"]
        if plain[name] != "note"
        else "?"
        for name in names
    }
    table = written(folder, "\t".join(names) + "\n" + "\t".join(value[n] for n in names) + "\n")
    [row] = read(table)
    assert isinstance(row, SourceRow)
    assert (row.caption, row.image) == ("a dog", "img/a.png")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "blip_caption,image",
            "no column caption; it has blip_caption, image.*columns.caption: blip_caption",
        ),
        ("caption,img", "no column image; it has caption, img.*captions.columns.image: img"),
        ("text,title,image", "text and title could each be the caption: set captions.columns.c"),
        ("caption,path,filepath", "path and filepath could each be the image"),
        ("Caption,caption,image", "column Caption is there more than once"),
    ],
)
def test_a_header_that_does_not_say_is_shown_with_the_nearest_guess(
    folder: Path, header: str, message: str
) -> None:
    for content in (header + "\n" + ",".join("x" * len(header.split(","))) + "\n",):
        with pytest.raises(CaptionTableError, match=message):
            read(written(folder, content, "t.csv"))
    pq.write_table(pa.table([["x"]] * len(header.split(",")), header.split(",")), folder / "t.pq")
    with pytest.raises(CaptionTableError, match=message):
        read(folder / "t.pq")


def test_columns_say_otherwise(folder: Path) -> None:
    table = written(
        folder, "caption,blip,where,image,nr\nold,a dog,img/a.png,http://x/y,7\n", "t.csv"
    )
    columns = {"caption": "blip", "image": "where", "id": "nr"}
    [row] = read(table, columns=columns)
    assert row == SourceRow(str(table), 2, "img/a.png", "a dog", "7", None)
    with pytest.raises(CaptionTableError, match="captions.columns.image is were.*nearest: where"):
        read(table, columns={"image": "were"})


# ---- JSON -----------------------------------------------------------------------------------

RECORDS = [
    {"file_name": "img/a.png", "text": "a dog"},
    {"file_name": "img/b.png", "text": ["a cat", "a tom"]},
    {"file_name": "img/c.png", "text": None},
    {"text": "nowhere"},
    {"file_name": 3, "text": "a number"},
]


@pytest.mark.parametrize("listed", [False, True])
def test_json_records(folder: Path, listed: bool) -> None:
    text = json.dumps(RECORDS, indent=1) if listed else "\n".join(map(json.dumps, RECORDS)) + "\n\n"
    for name in ("t.json", "t.jsonl", "t.ndjson"):
        rows = read(written(folder, text, name))
        assert [(r.row, r.image, r.caption) for r in rows if isinstance(r, SourceRow)] == [
            (1, "img/a.png", "a dog"),
            (2, "img/b.png", "a cat"),
            (2, "img/b.png", "a tom"),
            (3, "img/c.png", ""),
            (4, "", "nowhere"),
        ]
        assert [(r.row, r.reason) for r in rows if isinstance(r, Exclusion)] == [("5", "malformed")]
    zipped = written(folder, gzip.compress(text.encode("utf-16")), "t.json.gz")
    assert len(read(zipped)) == 6


def test_broken_json_is_named_by_line_or_element(folder: Path) -> None:
    rows = read(written(folder, '{"text": "a", "path": "img/a.png"}\n{"text": \n', "t.jsonl"))
    assert [(r.row, r.reason) for r in rows[1:]] == [("2", "not JSON")]  # type: ignore[union-attr]
    table = written(folder, '[{"text": "a", "path": "img/a.png"}, {"text": ]', "t.json")
    with pytest.raises(CaptionTableError, match="element 2"):
        read(table)
    for text in ("[]", "", "[1, 2]", '"text"'):
        with pytest.raises(CaptionTableError, match="no record"):
            read(written(folder, text, "t.json"))


# ---- Parquet, Arrow -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view()),
        *(pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string())),
    ],
    ids=str,
)
def test_every_type_of_text(folder: Path, kind: pa.DataType) -> None:
    def column(values: list[str | None]) -> pa.Array:
        return pa.array(values, pa.string()).cast(kind)

    table = pa.table({"Text": column(["a", None]), "Path": column(["img/a.png", "img/b.png"])})
    pq.write_table(table, folder / "t.parquet")
    assert captions(folder / "t.parquet") == ["a", ""]


def test_ids_of_other_types(folder: Path) -> None:
    def ids(values: list[Any]) -> list[str | None]:
        columns = {"caption": ["x"] * len(values), "image": ["y"] * len(values), "id": values}
        pq.write_table(pa.table(columns), folder / "t.parquet")
        return [r.id if isinstance(r, SourceRow) else r.reason for r in read(folder / "t.parquet")]

    assert ids([1.0, 2.0, None]) == ["1", "2", ""]
    assert ids([1, 2**60]) == ["1", str(2**60)]
    assert ids([0.5]) == ["malformed"]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())], ids=str)
def test_several_captions_of_a_picture(folder: Path, tmp_path: Path, kind: pa.DataType) -> None:
    lists = [["a", "a2", "a3"], ["b"], [], ["d", "d2"]]
    table = pa.table({"caption": pa.array(lists, kind), "image": [f"img/{n}.png" for n in "abcd"]})
    pq.write_table(table, folder / "t.parquet")
    assert captions(folder / "t.parquet") == ["a", "a2", "a3", "b", "", "d", "d2"]
    assert captions(folder / "t.parquet", several_captions="first") == ["a", "b", "", "d"]
    drawn = [captions(folder / "t.parquet", several_captions="random", seed=s) for s in range(20)]
    assert {tuple(one[1:3]) for one in drawn} == {("b", "")}
    assert {one[0] for one in drawn} == {"a", "a2", "a3"}
    assert drawn[3] == captions(folder / "t.parquet", several_captions="random", seed=3)
    report = check(folder / "t.parquet", tmp_path / "out.parquet")
    assert (report.kept, report.reasons) == (6, {"no caption": 1})
    assert [row.id for row in CaptionTable(tmp_path / "out.parquet")][:3] == ["1", "1#2", "1#3"]


def test_parts_of_a_table(folder: Path, tmp_path: Path) -> None:
    parts = folder / "parts"
    parts.mkdir()
    for place in range(2):
        images = [f"../img/{name}.png" for name in NAMES[place * 2 : place * 2 + 2]]
        pq.write_table(
            pa.table({"caption": ["x", "y"], "image": images}), parts / f"part-{place}.parquet"
        )
    for table in (parts, parts / "part-*.parquet", parts / "part-{0..1}.parquet"):
        out = tmp_path / "out.parquet"
        with pytest.raises(CaptionTableError, match=f"captions.images_dir: {folder}/img"):
            check(table, out)
        assert check(table, out, images_dir=str(folder / "img")).kept == 4
        rows = list(CaptionTable(out))
        assert [row.id for row in rows] == ["part-0/1", "part-0/2", "part-1/1", "part-1/2"]
        assert open_picture(rows[2].image).getpixel((0, 0)) == (40, 0, 0)
    with pytest.raises(CaptionTableError, match=r"part-2.parquet is missing"):
        read(parts / "part-{0..2}.parquet")


def test_parts_of_the_hub_are_named_by_their_split(folder: Path, tmp_path: Path) -> None:
    (folder / "set/data").mkdir(parents=True)
    for name in ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"):
        pq.write_table(embedded(folder).slice(0, 1), folder / f"set/data/{name}.parquet")
    report = check(folder / "set", tmp_path / "out.parquet")
    assert report.splits == {"train": 1, "val": 1, "test": 1}


def test_a_table_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    written(folder, "caption\timage\na dog\ta.png\n")
    assert captions("~/table.tsv", images_dir="~/img") == ["a dog"]


def embedded(folder: Path, **more: Any) -> pa.Table:
    """A table as `datasets` writes it: the first picture in it, the second beside it."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [
        {"bytes": (folder / "img/b.png").read_bytes(), "path": "b.png"},
        {"bytes": None, "path": "img/c.png"},
        None,
    ]
    return pa.table({"image": pa.array(pictures, kind), "text": ["a dog", "a cat", "none"], **more})


def write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


def test_pictures_in_the_table_itself(folder: Path, tmp_path: Path) -> None:
    table = embedded(folder)
    pq.write_table(table, folder / "t.parquet", row_group_size=1)
    write_arrow(table, folder / "t.arrow")
    plain = pa.table({"image": [(folder / "img/b.png").read_bytes()], "text": ["a dog"]})
    pq.write_table(plain, folder / "bytes.parquet")
    pa.feather.write_feather(plain, folder / "bytes.feather")
    pq.write_table(plain.rename_columns(["jpg", "txt"]), folder / "bytes_i2d.parquet")
    for name in ("t.parquet", "t.arrow", "bytes.parquet", "bytes.feather", "bytes_i2d.parquet"):
        for params in ({}, {"images_dir": str(folder)}, {"check": "header"}):
            out = tmp_path / "out.parquet"
            report = check(folder / name, out, **params)
            reds = [open_picture(row.image).getpixel((0, 0)) for row in CaptionTable(out)]
            assert reds == [(20, 0, 0), (40, 0, 0)][: report.kept]
            assert report.reasons == ({"no image": 1} if name[0] == "t" else {})


def test_a_data_set_saved_to_disk(folder: Path, tmp_path: Path) -> None:
    """The layout that `save_to_disk` of `datasets` 4 writes."""
    saved = folder / "saved"
    for split in ("train", "validation"):
        (saved / split).mkdir(parents=True)
        write_arrow(embedded(folder).slice(0, 1), saved / split / "data-00000-of-00001.arrow")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
        (saved / split / "state.json").write_text(json.dumps(state))
    assert captions(saved / "train") == ["a dog"]
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    report = check(saved, tmp_path / "out.parquet")
    assert report.splits == {"train": 1, "val": 1, "test": 0}
    for name, content in (("dataset_dict.json", "{}"), ("train/state.json", "[]")):
        (saved / name).write_text(content)
        with pytest.raises(CaptionTableError, match=name):
            read(saved if "dict" in name else saved / "train")


def test_a_data_set_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library hands over, without a network: pictures in it, and in the hub's cache."""
    (folder / "datasets").mkdir()
    write_arrow(embedded(folder).slice(0, 1), folder / "datasets/x-train.arrow")
    beside = embedded(folder).to_pylist()[1:2]
    beside[0]["image"]["path"] = str(folder / "img/c.png")
    write_arrow(pa.Table.from_pylist(beside), folder / "datasets/x-test.arrow")
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "img"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    config = SimpleNamespace(HF_DATASETS_CACHE=str(folder / "datasets"), HF_HUB_OFFLINE=False)
    offline: list[bool] = []

    def load_dataset(name: str) -> dict[str, SimpleNamespace]:
        offline.extend((config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        if name != "some/pictures":
            raise FileNotFoundError(f"no {name} here")
        files = {name: str(folder / f"datasets/x-{name}.arrow") for name in ("train", "test")}
        return {
            name: SimpleNamespace(cache_files=[{"filename": file}]) for name, file in files.items()
        }

    library = SimpleNamespace(config=config, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: library)
    for allowed in (False, True):
        report = check("some/pictures", folder / "out.parquet", allow_download=allowed)
        assert report.splits == {"train": 1, "val": 0, "test": 1}
    assert offline == [True, True, False, False], "not allowed: nothing is asked of the hub"
    with pytest.raises(CaptionTableError, match="no other/one here; captions.allow_download: true"):
        read("other/one")
    assert (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (False, False)


@pytest.mark.parametrize("allowed", [False, True])
def test_the_library_itself_asks_the_hub_only_where_allowed(tmp_path: Path, allowed: bool) -> None:
    pytest.importorskip("datasets")
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    code = (
        "from corpora.caption_sources import open_source, CaptionParams\n"
        f"open_source(CaptionParams(table='some/pictures', allow_download={allowed}))"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
        }
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, env={**os.environ, **where}, capture_output=True, text=True)
        server.shutdown()
    assert "some/pictures: no such caption table here, and as a data set of the hub" in done.stderr
    assert bool(asked) is allowed


def test_a_hub_id_needs_the_extra_or_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CaptionTableError, match=r"no such caption table.*gill\[datasets\]"):
        read("somebody/something")
    with pytest.raises(CaptionTableError, match=r"photos/captions.tsv: no such caption table$"):
        read("photos/captions.tsv")


# ---- folders and shards ---------------------------------------------------------------------


def test_a_folder_of_pictures_with_texts_beside_them(folder: Path, tmp_path: Path) -> None:
    """Kohya's layout (.txt, .caption), and img2dataset's `files` (.txt and .json)."""
    root = folder / "files"
    for name in ("00000/a", "00000/b", "00001/c", "00001/d"):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"img/{path.name}", path)
    (root / "00000/a.txt").write_bytes(b"\xef\xbb\xbfa dog\n")
    (root / "00000/a.json").write_text('{"caption": "not this"}')
    (root / "00000/b.json").write_text('{"caption": "a cat"}')
    (root / "00001/c.caption").write_text("a hen")
    shutil.move(root / "00001/d.png", root / "00001/d.JFIF")
    (root / "00001/e.txt").write_text("alone")
    (root / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"key": ["0"], "url": ["u"], "caption": ["x"]}), root / "00000.parquet")
    report = check(root, tmp_path / "out.parquet")
    rows = list(CaptionTable(tmp_path / "out.parquet"))
    assert [(row.id, row.caption) for row in rows] == [
        ("00000/a", "a dog"),
        ("00000/b", "a cat"),
        ("00001/c", "a hen"),
    ]
    assert report.reasons == {"no image": 1, "no caption": 1}
    with pytest.raises(CaptionTableError, match="a folder of pictures holds their own pictures"):
        read(root, images_dir=str(root))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_an_image_folder_of_datasets(folder: Path, tmp_path: Path, name: str) -> None:
    for split, file in (("train", "a.png"), ("test", "b.png")):
        part = folder / "set" / split
        part.mkdir(parents=True)
        shutil.copy(folder / "img" / file, part / file)
        if name.endswith("jsonl"):
            (part / name).write_text(json.dumps({"file_name": file, "text": split}) + "\n")
        elif name.endswith("csv"):
            (part / name).write_text(f"file_name,text\n{file},{split}\n")
        else:
            pq.write_table(pa.table({"file_name": [file], "text": [split]}), part / name)
    report = check(folder / "set", tmp_path / "out.parquet")
    assert report.splits == {"train": 1, "val": 0, "test": 1}
    rows = list(CaptionTable(tmp_path / "out.parquet"))
    assert [(row.caption, row.split) for row in rows] == [("test", "test"), ("train", "train")]


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_what_stands_beside_a_picture_in_a_shard(folder: Path) -> None:
    picture = (folder / "img/a.png").read_bytes()
    rows = read(
        shard(
            folder / "0.tar",
            {
                "./0.JPG": picture,
                "./0.json": b'{"captions": ["a", "b"]}',
                "./._0.JPG": b"of a Macintosh",
                "1.jfif": picture,
                "1.txt": b"\xef\xbb\xbfwith a mark",
                "2.image.jpeg": picture,
                "2.caption": b"as for diffusion",
                "3.webp": picture,
                "3.txt": b"",
                "3.json": b'{"text": "from json"}',
                "4.avif": picture,
                "4.json": b'{"url": "u"}',
                "IMG_2024.01.05.jpg": picture,
                "IMG_2024.01.05.txt": b"a dog",
                "IMG_2024.01.06.jpg": picture,
                "5.heic": picture,
                "5.txt": b"caf\xe9",
            },
        )
    )
    texts = [(r.id, r.caption) for r in rows if isinstance(r, SourceRow)]
    assert texts == [
        ("0/./0", "a"),
        ("0/./0#2", "b"),
        ("0/1", "with a mark"),
        ("0/2", "as for diffusion"),
        ("0/3", "from json"),
        ("0/4", ""),
    ]
    merged, latin = (r for r in rows if isinstance(r, Exclusion))
    assert (merged.reason, latin.reason) == ("several images", "unreadable caption")
    assert merged.detail.startswith("IMG_2024: ")
    assert "IMG_2024.01.05.jpg, IMG_2024.01.06.jpg" in merged.detail
    assert latin.detail.startswith("5: ")


def test_a_sample_that_is_left_out_is_named_with_its_key(folder: Path, tmp_path: Path) -> None:
    picture = (folder / "img/a.png").read_bytes()
    members = {"k1.png": picture, "k2.png": picture, "k2.txt": b"a dog", "k3.png": picture}
    members |= {"k3.txt": b"a" * 3000, "k4.png": b"", "k4.txt": b"a cat", "k5.txt": b"alone"}
    report = check(shard(folder / "0.tar", members), tmp_path / "out.parquet")
    assert report.kept == 1
    for reason, key in (
        ("no caption", "0.tar#k1.png"),
        ("caption too long", "0.tar#k3.png: 3000 characters"),
        ("picture empty", "0.tar#k4.png"),
        ("no image", "k5: k5.txt"),
    ):
        assert key in report.examples[reason][0]


def test_shards_by_braces(folder: Path) -> None:
    picture = (folder / "img/a.png").read_bytes()
    for number in range(12):
        shard(folder / f"{number:05d}.tar", {"0.png": picture, "0.txt": str(number).encode()})
    assert captions(folder / "{00002..00011}.tar") == [str(n) for n in range(2, 12)]
    assert captions(f"{folder}/{{00003,00001}}.tar") == ["3", "1"]
    assert captions(f"{folder}/0000[12].tar") == ["1", "2"]
    with pytest.raises(CaptionTableError, match=r"00012.tar is missing"):
        read(folder / "{00000..00013}.tar")


def test_compressed_shards_are_unpacked_once(folder: Path, tmp_path: Path) -> None:
    packed = []
    for number, name in enumerate(("z.tar.gz", "y.tgz", "x.tar")):
        picture = (folder / f"img/{NAMES[number]}.png").read_bytes()
        plain = shard(folder / "plain", {"./0.png": picture, "./0.txt": name.encode()})
        data = plain.read_bytes()
        (folder / name).write_bytes(data if name == "x.tar" else gzip.compress(data))
        packed.append(folder / name)
    for _ in range(2):
        check(folder, tmp_path / "out.parquet")
        rows = list(CaptionTable(tmp_path / "out.parquet"))
        assert [(r.id, r.caption) for r in rows] == [
            ("x/./0", "x.tar"),
            ("y/./0", "y.tgz"),
            ("z/./0", "z.tar.gz"),
        ]
        assert [open_picture(r.image).getpixel((0, 0))[0] for r in rows] == [40, 20, 0]
        assert len(list((tmp_path / "unpacked").iterdir())) == 2
    (folder / "z.tar.gz").write_bytes(gzip.compress(b"")[:-4])
    with pytest.raises(CaptionTableError, match=r"z.tar.gz: cannot be unpacked"):
        check(folder / "z.tar.gz", tmp_path / "out.parquet")
    assert len(list((tmp_path / "unpacked").iterdir())) == 2


def test_there_is_one_list_of_suffixes() -> None:
    assert {"jpg", "jpeg", "jfif", "webp", "avif", "heic", "jxl", "png"} <= PICTURE_SUFFIXES


# ---- paths ----------------------------------------------------------------------------------


def respelled(folder: Path, tmp_path: Path, *images: str, **params: Any) -> CaptionReport:
    text = "caption\timage\n" + "".join(f"text {i}\t{x}\n" for i, x in enumerate(images))
    return check(written(folder, text), tmp_path / "out.parquet", **params)


def kept_images(tmp_path: Path, folder: Path) -> list[str]:
    rows = CaptionTable(tmp_path / "out.parquet")
    return [str(Path(row.image).relative_to(folder)) for row in rows]


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("img\\a.png", "img/a.png"),
        (".\\img\\a.png", "img/a.png"),
        ("IMG/A.PNG", "img/a.png"),
        ("img/caf%C3%A9%20%281%29.png", "img/café (1).png"),
        ("img/cafe\u0301 (1).png", "img/café (1).png"),
        ("img\\CAFE\u0301%20(1).png", "img/café (1).png"),
        ("'img/a.png'", "img/a.png"),
        ("img//a.png", "img/a.png"),
        ("img/100%.png", "img/100%.png"),
    ],
)
def test_another_spelling_of_a_path(folder: Path, tmp_path: Path, image: str, file: str) -> None:
    shutil.copy(folder / "img/a.png", folder / "img/café (1).png")
    shutil.copy(folder / "img/a.png", folder / "img/100%.png")
    report = respelled(folder, tmp_path, image)
    assert kept_images(tmp_path, folder) == [file]
    assert report.paths_respelled == (image not in ("img//a.png", "img/100%.png"))


def test_a_spelling_that_fits_several_files_is_only_hinted_at(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "img/a.png", folder / "img/A.png")
    report = respelled(folder, tmp_path, "img/a.PNG", "img/b.pgn", "image/a.png", "img/b.png")
    assert report.reasons == {"picture missing": 3}
    first, second, third = report.examples["picture missing"]
    assert "could be img/A.png or img/a.png" in first
    assert "near: img/b.png" in second
    assert "no folder image" in third


def test_absolute_paths(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    images = (
        f"{folder}/img/a.png",
        f"{folder}/img/../img/b.png",
        f"file://{folder}/img/c.png",
        "~/img/d.png",
        "/etc/hostname",
    )
    for params in ({}, {"images_dir": str(folder)}, {"images_dir": str(folder.parent)}):
        report = respelled(folder, tmp_path, *images, **params)
        assert kept_images(tmp_path, folder) == [f"img/{name}.png" for name in "abcd"]
        assert report.reasons == {"outside images_dir": 1}
        assert "captions.images_dir" in report.remedies["outside images_dir"]
    with pytest.raises(CaptionTableError, match=f"set captions.images_dir: {folder}/img,"):
        respelled(folder, tmp_path, *images[:3], "/etc/hostname", images_dir="/usr")


# ---- captions that nobody can see -----------------------------------------------------------

INVISIBLE = [
    *("\u200b", "\u200b\u200d", "\u00ad", "\u2060 \ufe0f", "\u202e\u202c", "\U000e0001"),
    *("\u3164", "\u115f\u1160", "\uffa0", "\u2800", "\u034f", "\U000e0041\U000e007f", "\u180e"),
]
VISIBLE = ["🐶🔥", "مرحبا", "e\u0301", "nan", "</s>", "[IMG0]", "👩\u200d🚀", "-", "한"]


def test_captions_that_nobody_can_see_are_none(folder: Path, tmp_path: Path) -> None:
    text = "caption\timage\n" + "".join(f"{c}\timg/a.png\n" for c in (*INVISIBLE, *VISIBLE))
    report = check(written(folder, text), tmp_path / "out.parquet")
    assert report.reasons == {"no caption": len(INVISIBLE)}
    assert [row.caption for row in CaptionTable(tmp_path / "out.parquet")] == VISIBLE


# ---- the report -----------------------------------------------------------------------------


def test_the_report_says_reason_count_examples_and_remedy_in_five_lines(
    folder: Path, tmp_path: Path
) -> None:
    rows = [f"t{i}\tno{i}.png" for i in range(7)] + ["\timg/a.png"] * 5 + ["a\thttp://x/y.png"] * 4
    rows += ["a\t"] * 3 + ["a\timg/a.png"] * 3
    report = check(written(folder, "caption\timage\n" + "\n".join(rows)), tmp_path / "out.parquet")
    assert list(report.reasons.items()) == [
        *(("picture missing", 7), ("no caption", 5), ("url", 4), ("no image", 3), ("duplicate", 2)),
    ]
    assert {len(examples) for examples in report.examples.values()} == {2, 3}
    assert report.remedies == {reason: REMEDIES[reason] for reason in report.reasons}
    lines = report.lines(tmp_path / "out.excluded.tsv")
    assert len(lines) == 5
    assert lines[0].endswith(": 1 rows kept, 21 excluded")
    assert lines[1].startswith("  picture missing 7: see captions.images_dir")
    assert "row 2: picture missing (no0.png: no such file" in lines[1]
    assert lines[4] == f"  2 more reasons; all of them: {tmp_path}/out.excluded.tsv"


def test_every_reason_has_a_remedy() -> None:
    """Reasons are written where rows are excluded; this reads them there."""
    room = Path(__file__).parents[1] / "corpora"
    pattern = re.compile(r'(?:excluded\(|Exclusion\([^"\n]*?, )"([a-z][a-zA-Z _]+)"')
    modules = (
        "captions",
        "text_table",
        "json_table",
        "arrow_table",
        "shard_samples",
        "source_rows",
    )
    found = {
        reason
        for name in modules
        for reason in pattern.findall((room / f"{name}.py").read_text(encoding="utf-8"))
    }
    found |= {f"picture {kind}" for kind in get_args(PictureErrorKind)}
    assert len(found) > 20
    assert found <= set(REMEDIES), found - set(REMEDIES)


# ---- the collected inputs -------------------------------------------------------------------

Expect = Callable[[list[str]], bool]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tables/blank_first.tsv", ["a dog", "a cat"]),
        ("tar/z.tar.gz", ["a dog"]),
        ("tables/comma.csv", ["a dog"]),
        ("tables/openclip.csv", ["a dog"]),
        ("tables/metadata.jsonl", ["a dog"]),
        ("tables/utf16.tsv", ["a dog", "a cat"]),
        (
            "tables/pandas_quoted.tsv",
            [
                *('a sign that says "STOP"', "a plain dog", "two lines of caption", "tab here"),
                *('he said "hi" and left', "a cat"),
            ],
        ),
        ("tables/path_variants.tsv", [f"caption {n}" for n in (0, 1, 2, 3, 5, 6, 7, 8)]),
        ("tables/splits.tsv", [f"c{n}" for n in range(6)]),
        ("parquet/cased.parquet", ["a", "b", "c", "d"]),
        ("parquet/floatid.parquet", ["a", "b", "d"]),
        ("parquet/hf_imagefolder.parquet", ["a", "b", "c", "d"]),
        ("parquet/listcap.parquet", ["a", "a2", "b"]),
        ("parquet/view.parquet", ["a", "b", "d"]),
        (
            "tar/multi.tar",
            [
                *("a", "b", "line one line two", "x", "y", "a thing", "jfif", "sd style"),
                *("bom caption", "multi ext", "from json"),
            ],
        ),
    ],
)
def test_the_collected_inputs(
    tmp_path: Path, shared_data: Path, name: str, expected: list[str]
) -> None:
    folder = shared_data / "awkward_inputs"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    params = {"images_dir": str(folder / "tables")} if name.startswith("parquet") else {}
    check(folder / name, tmp_path / "out.parquet", **params)
    table = CaptionTable(tmp_path / "out.parquet")
    assert [row.caption for row in table] == expected
