"""Results and records survive their files; published numbers are the paper's."""

import pytest

from stages.failures import StageError
from stages.results import (
    Record,
    Result,
    read_records,
    read_results,
    write_records,
    write_results,
)


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
