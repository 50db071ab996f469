"""Which rows training is validated on, and which of them are answers to each other."""

import json
from pathlib import Path

import pytest

from corpora.caption_table import CaptionTable, CaptionTableWriter, CheckedRow
from gill.artifacts import Artifacts
from settings.params import CaptionsParams, Params
from stages.validation_rows import contents_of, one_row_per_picture

PICTURES = ["a", "a", "b", "c", "b", "d"]
SCENES = {"a": "sea red", "b": "desert blue", "c": "sea red", "d": "sea blue"}


@pytest.fixture
def table(tmp_path: Path) -> CaptionTable:
    """Two captions of some pictures, not all side by side."""
    with CaptionTableWriter(tmp_path / "captions.parquet", str(tmp_path / "world")) as writer:
        for i, name in enumerate(PICTURES):
            row = (f"{i}", f"images/{name}.png", f"caption {i}", "val", i + 1, name.encode() * 16)
            writer.append(CheckedRow(*row))
        writer.close()
    return CaptionTable(tmp_path / "captions.parquet")


def test_a_picture_is_measured_once_and_answers_for_its_scene(
    table: CaptionTable, tmp_path: Path
) -> None:
    rows = one_row_per_picture(table, table.rows_of_split("val")[1:])
    assert rows.tolist() == [1, 2, 3, 5]
    (tmp_path / "miniature").mkdir()
    truth = {f"images/{name}.png": scene.split() for name, scene in SCENES.items()}
    (tmp_path / "miniature/truth.json").write_text(json.dumps({"pictures": truth}))
    scenes = contents_of(table, rows, Params(), Artifacts(tmp_path))
    assert [[int(a == b) for b in scenes] for a in scenes] == [
        [1, 0, 1, 0],
        [0, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    own = Params(captions=CaptionsParams(table="own.tsv"))
    assert len(set(contents_of(table, rows, own, Artifacts(tmp_path)))) == 4
    assert one_row_per_picture(table, rows[:0]).tolist() == []
