"""Results and records survive their files; published numbers are the paper's."""

from typing import get_args

import pytest

from evaluation.published import PUBLISHED, published
from evaluation.results import (
    Record,
    Result,
    read_records,
    read_results,
    write_records,
    write_results,
)
from gill_errors import StageError
from settings.evaluation import TableName


def test_results_come_back_as_they_were(tmp_path):
    results = [
        Result("table_1", "story_1", "One", "gill", "fid", None, None, None, None, 3, 5, 0.5, "no"),
        Result("table_1", "story_1", "One", "gill", "clip_similarity", 0.1, 0.2, 0.0, 0.3, 3, 5),
    ]
    path = tmp_path / "deep" / "results.json"
    write_results(path, results)
    assert read_results(path) == results
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_records_come_back_and_sets_need_not_have_the_same_columns(tmp_path):
    records = [
        Record(
            set="story_1",
            id="7",
            prompt="it rained .",
            context=({"text": "it rained ."}, {"picture": "a.png"}),
            real="b.png",
            scene="sea red",
            pictures={"gill": "c.png"},
            scores={"gill.clip_similarity": 0.25, "gill.oracle_attributes": 0.8},
        ),
        Record(
            "vqa", "8", "is it?", (), references=("yes", "no"), texts={"gill": "yes"}, scores={}
        ),
    ]
    write_records(tmp_path / "records.parquet", records)
    assert read_records(tmp_path / "records.parquet") == records


def test_missing_and_foreign_files_are_one_clear_line(tmp_path):
    for read in (read_results, read_records):
        with pytest.raises(StageError, match="run `stages evaluate`"):
            read(tmp_path / "absent")
    (tmp_path / "results.json").write_text('[{"table": "table_1"}]')
    with pytest.raises(StageError, match=r"results\.json cannot be read"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("table_1", "story_1", "glide", "clip_similarity"), 0.582),
        (("table_1", "story_5", "generator", "lpips"), 0.704),
        (("table_1", "story_5_pictures", "gill", "clip_similarity"), 0.641),
        (("table_2", "dialogue_5", "generator", "clip_similarity"), 0.629),
        (("table_2", "dialogue_10", "gill", "lpips"), 0.714),
        (("table_3", "captions", "encoder", "fid"), 16.30),
        (("table_3", "story_5_pictures", "mlp", "clip_similarity"), 0.502),
        (("table_4", "captions", "r1", "fid"), 15.93),
        (("table_4", "story_5_pictures", "r4", "clip_similarity"), 0.642),
        (("table_5", "story_5_pictures", "clip", "recall_at_10"), 0.298),
        (("table_5", "story_5_pictures", "gill", "recall_at_1"), 0.203),
        (("table_6", "decision", "always_generate", "macro_f1"), 0.389),
        (("table_6", "decision", "linear", "macro_f1"), 0.547),
        (("table_7", "vqa", "magma", "vqa_accuracy"), 0.2835),
        (("table_7", "coco_captioning", "gill", "meteor"), 0.2529),
        (("table_8", "coco_fid", "generator", "fid"), 9.22),
        (("table_8", "coco_fid", "re_imagen", "fid"), 6.88),
        (("section_5", "story_5_pictures", "generation_only", "clip_similarity"), 0.636),
        (("latency", "generation", "gill", "seconds"), 3.5),
    ],
)
def test_published_numbers_are_the_papers(key, value):
    assert published(*key) == value


def test_published_keys_are_those_of_results():
    metrics = {"clip_similarity", "lpips", "fid", "macro_f1", "bleu_4", "meteor", "vqa_accuracy"}
    metrics |= {"recall_at_1", "recall_at_5", "recall_at_10", "seconds"}
    tables = {*get_args(TableName), "section_5"}
    for (table, set_, method, metric), number in PUBLISHED.items():
        assert table in tables
        assert metric in metrics
        assert all(part == part.strip() and part for part in (set_, method))
        assert metric in ("fid", "seconds") or 0 < number < 1
    # Tables 1 to 4, section 5, Tables 5 to 8, appendix E.4.
    assert len(PUBLISHED) == 14 + 18 + 10 + 8 + 4 + 9 + 6 + 8 + 9 + 2
    assert published("table_1", "story_5_pictures", "generator", "clip_similarity") is None
