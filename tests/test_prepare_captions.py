"""Stage prepare-captions: what it says on the screen, what DVC watches, what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from corpora.caption_table import CaptionTable
from gill.artifacts import ARTIFACTS
from gill_errors import StageError
from settings.params import Params
from stages import prepare_captions, train

PARAMS = {"training": {"batch_size": 8}, "evaluation": {"tables": ["captions", "latency"]}}


def params(**sections: dict) -> Params:
    return Params.model_validate({**PARAMS, **sections})


@pytest.mark.parametrize(
    ("splits", "sections", "lines"),
    [
        ({"train": 8, "val": 1, "test": 1}, {}, []),
        ({"train": 8, "val": 0, "test": 1}, {"batches": {"validation_rows": 0}}, []),
        (
            {"train": 8, "val": 0, "test": 1},
            {},
            ["train validates on the split val, which has no rows: it goes on without; set"],
        ),
        (
            {"train": 7, "val": 1, "test": 1},
            {},
            ["train takes 8 rows a step, but the split train has 7: set training.batch_size lower"],
        ),
        ({"train": 1, "val": 0, "test": 1}, {"training": {"weights": "w"}}, []),
        (
            {"train": 0, "val": 0, "test": 1},
            {"training": {"weights": "w"}},
            ["build-index takes the pictures of the split train, which has no rows: add some, or"],
        ),
        (
            {"train": 0, "val": 0, "test": 1},
            {"training": {"weights": "w"}, "index": {"candidates": "others.tsv"}},
            [],
        ),
        (
            {"train": 8, "val": 0, "test": 0},
            {"training": {"batch_size": 8, "checkpoint": "best"}},
            [
                "training.checkpoint: best is chosen on the split val, which has no rows: set",
                "evaluate reads the split test for captions, latency, which has no rows: set",
            ],
        ),
        ({"train": 8, "val": 1, "test": 0}, {"evaluation": {"tables": ["table_6"]}}, []),
    ],
)
def test_what_later_stages_need_is_said_at_once(
    splits: dict[str, int], sections: dict, lines: list[str]
) -> None:
    found = prepare_captions.unmet_needs(splits, params(**sections))
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines))


def test_the_stage_says_what_it_left_out_and_has_every_file_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "parts/my #1.png")
    Image.new("RGB", (3, 4)).save(tmp_path / "parts/b.png")
    for part in "12":
        text = f"caption,image\ntext {part},my #1.png\nother {part},B.png\n,b.png\nx,no.png\n"
        (tmp_path / f"parts/{part}.csv").write_text(text)
    captions = {"table": "parts/*.csv", "test_fraction": 0.0}
    table = {"captions": captions, "training": {"batch_size": 4}}
    quiet = {"evaluation": {"tables": ["table_6"]}, "batches": {"validation_rows": 0}}
    chosen = Params.model_validate({**table, **quiet})
    prepare_captions.run(chosen)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "parts/*.csv: 4 rows kept, 4 excluded, 2 pictures found by another spelling of their names"
    )
    assert len(lines) == 4
    assert lines[1].startswith("  no caption 2: ")
    assert lines[3] == "  all of them: artifacts/captions/captions.excluded.tsv"
    watched = {link.resolve() for link in (tmp_path / "inputs").rglob("*") if link.is_symlink()}
    assert {path.name for path in watched} == {"1.csv", "2.csv", "my #1.png", "b.png"}
    assert len(CaptionTable(tmp_path / "artifacts/captions/captions.parquet")) == 4

    needy = Params.model_validate({**table, "training": {"batch_size": 64}})
    prepare_captions.run(needy)
    said = capsys.readouterr().out.splitlines()[len(lines) :]
    assert [line.split(",")[0] for line in said] == [
        "  train takes 64 rows a step",
        "  train validates on the split val",
        "  evaluate reads the split test for captions",
    ]
    best = Params.model_validate({**table, "training": {"batch_size": 4, "checkpoint": "best"}})
    entry = SimpleNamespace(decided_by={"stores": {}})
    with pytest.raises(StageError, match=r"best is chosen on the split val.*captions.val_fraction"):
        train._train(entry, best, ARTIFACTS, tmp_path)  # type: ignore[arg-type]
