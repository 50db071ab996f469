"""From a file of documents to heads: stages prepare-captions to train, on a mixture."""

import json
import shutil
from pathlib import Path

import pytest
from stage_runs import refusal, run, write_params
from typer.testing import CliRunner

from corpora.caption_table import CaptionTable
from evaluation.variants import lay_over
from stages.cli import app
from tests.test_train_stage import BASE, HEADS

MIXTURE = {
    "captions": {"documents": {"file": "documents.jsonl", "images_dir": "artifacts/miniature"}},
    "training": {"mixture": {"captions": 1, "documents": 1}},
}


def images(split: str, number: int) -> list[dict[str, str]]:
    return [{"image": f"images/{split}/{i:06d}.png"} for i in range(number)]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A working directory in which everything before training is done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("world"))
        write_params(**BASE)
        run("prepare-captions")
        assert Path("artifacts/captions/documents.jsonl").read_text() == "\n"
        written = [
            [{"text": f"a ring {i}."}, one, {"text": "it turns blue."}, other]
            for i, (one, other) in enumerate(zip(images("train", 8), images("train", 16)[8:]))
        ]
        written += [[{"text": "alone."}], [{"text": "lost."}, {"image": "images/none.png"}]]
        Path("documents.jsonl").write_text("\n".join(map(json.dumps, written)))
        write_params(**lay_over(BASE, MIXTURE))
        said = run("prepare-captions")
        assert "document without pictures 2" in said
        for stage in ("prepare-backbones", "precompute-features", "precompute-targets"):
            run(stage)
        yield


def test_pictures_of_documents_are_encoded_behind_the_captions() -> None:
    table = CaptionTable("artifacts/captions/captions.parquet")
    rows = table.rows_of_split("documents")
    assert rows.tolist() == list(range(len(table) - 16, len(table)))
    assert json.loads(Path("artifacts/features.manifest.json").read_text())["num_rows"] == len(
        table
    )


def test_a_killed_training_on_a_mixture_goes_on_to_the_same_bytes() -> None:
    run("train")
    heads = HEADS.read_bytes()
    curve = json.loads(Path("metrics/train/metrics.json").read_text())
    assert curve["validation"]["captioning"] > 0
    for made in ("work/training", "artifacts/model", "metrics"):
        shutil.rmtree(made)

    def stop(progress: object) -> None:
        if progress.step == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.head_training.show_progress", stop)
        assert CliRunner().invoke(app, ["train"]).exit_code == 130
    assert "going on from the last state" in run("train")
    assert HEADS.read_bytes() == heads
    write_params(**BASE)
    run("train")
    assert HEADS.read_bytes() != heads, "captions alone are another training"
    write_params(**lay_over(BASE, MIXTURE))
    assert "nothing to do: trained before" in run("train")


def test_documents_alone_train_and_what_is_cut_is_counted() -> None:
    changes = {"training": {"mixture": {"documents": 1}}, "batches": {"max_document_tokens": 16}}
    write_params(**lay_over(lay_over(BASE, MIXTURE), changes))
    assert "documents did not fit and were cut at their end" in run("train")


def test_a_mixture_without_its_corpus_is_one_line() -> None:
    write_params(**lay_over(BASE, {"training": {"mixture": {"documents": 1}}}))
    assert "captions.documents.file names no file" in refusal("train")
    write_params(**lay_over(BASE, {"training": {"mixture": {"films": 1}}}))
    assert "training.mixture" in refusal("train")
    absent = {"captions": {"documents": {"file": "nowhere.jsonl"}}}
    write_params(**lay_over(BASE, absent))
    assert "nowhere.jsonl" in refusal("prepare-captions")
