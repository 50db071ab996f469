"""Aggregation and verdicts on hand-made cells, whose differences are known."""

import json

import numpy as np
import pytest

from evaluation import findings
from evaluation.cell_scores import CellScores, Term
from evaluation.finding_claims import CLAIMED
from evaluation.results import Record, Result, write_records, write_results
from evaluation.variants import Study, cell
from gill.artifacts import Artifacts
from gill_errors import StageError

VARIANTS = ("gill", "linear", "mlp", "encoder", "r1", "r2", "r4", "generation_only", "released")
SETS = (
    ["captions"]
    + [f"story_{n}" for n in range(1, 6)]
    + [f"story_{n}_pictures" for n in range(2, 6)]
    + [f"dialogue_{n}" for n in range(1, 11)]
)
EXAMPLES = 24
F1 = {"linear": 0.9, "heuristic": 0.85, "random": 0.5, "always_generate": 0.4,
      "always_retrieve": 0.3}  # fmt: skip


def _as_in_the_paper(variant: str, set_: str, method: str) -> float:
    """Means under which all six findings hold."""
    if method == "generator":
        return {"captions": 0.9, "story_1": 0.5}.get(set_, 0.4)
    drop = {"linear": 0.2, "mlp": 0.2, "encoder": 0.1, "r1": 0.15, "r2": 0.05}.get(variant, 0.0)
    if set_.startswith("dialogue"):
        return 0.3 + 0.06 * int(set_.split("_")[1]) - drop
    if set_.startswith("story"):
        return (0.8 if set_.endswith("pictures") else 0.4 + 0.05 * int(set_[-1])) - drop
    return 0.9 - drop


def _write_cell(one, mean, rng, recall=0.2):
    """One cell whose examples scatter around `mean`."""
    hard = np.random.default_rng(7).normal(0, 0.05, EXAMPLES)  # what all methods share
    records, results = [], []
    methods = ("gill", "generator") if one.name == "gill" else ("gill",)
    for set_ in SETS:
        means = {m: mean(one.name, set_, m) for m in methods}
        noise = {m: hard + rng.normal(0, 0.01, EXAMPLES) for m in methods}
        for i in range(EXAMPLES):
            scores = {
                f"{m}.{metric}": means[m] + noise[m][i]
                for m in methods
                for metric in ("oracle_attributes", "clip_similarity")
            }
            records.append(Record(set=set_, id=str(i), prompt="", context=(), scores=scores))
        results += [
            _result("table_1", set_, m, metric, means[m])
            for m in methods
            for metric in ("oracle_attributes", "clip_similarity")
        ]
    if one.name == "gill":
        for k in (1, 5, 10):
            for method, base in (("gill", recall), ("clip", 0.1)):
                value = base + rng.normal(0, 0.001)
                results.append(
                    _result("table_5", "story_5_pictures", method, f"recall_at_{k}", value)
                )
        for method, value in F1.items():
            value += rng.normal(0, 0.01)
            results.append(_result("table_6", "decision", method, "macro_f1", value))
    write_records(one.artifacts.evaluation / "records.parquet", records)
    write_results(one.artifacts.evaluation / "results.json", results)
    record = {"code": "abc", "finished": "2026-01-01 00:00 UTC", "seconds": {"train": 1.0},
              "versions": {"torch": "2"}}  # fmt: skip
    one.record.write_text(json.dumps(record))


def _result(table, set_, method, metric, value):
    return Result(table, set_, set_, method, metric, value, None, None, None, EXAMPLES, EXAMPLES)


@pytest.fixture
def study(monkeypatch):
    """A study whose cells count as finished when they are there."""
    monkeypatch.setattr(findings, "is_done", lambda params, study, one: one.record.is_file())
    return Study.model_validate(
        {"seeds": [0, 1, 2], "variants": {name: {"title": name} for name in VARIANTS}}
    )


def _run(tmp_path, study, mean=_as_in_the_paper, seeds=(0, 1, 2), **kwargs):
    artifacts = Artifacts(tmp_path / "artifacts")
    rng = np.random.default_rng(0)
    for name in study.variants:
        for seed in seeds:
            one = cell(name, seed, artifacts)
            _write_cell(one, mean, rng, **kwargs)
    findings.run(tmp_path / "params.yaml", study, artifacts, tmp_path / "metrics")
    content = json.loads((artifacts.findings / "findings.json").read_text())
    return content, {found["number"]: found["verdicts"] for found in content["findings"]}


def test_a_world_like_the_paper_shows_every_finding(tmp_path, study):
    content, verdicts = _run(tmp_path, study)
    both = {"oracle_attributes": "seen", "clip_similarity": "seen"}
    assert verdicts == {
        1: both, 2: both, 3: both, 4: {"recall": "seen"}, 5: {"macro_f1": "seen"}, 6: both,
    }  # fmt: skip
    part = content["findings"][0]["parts"][1]
    found = part["by"]["oracle_attributes"]
    assert found["first"] == pytest.approx(0.65, abs=0.05)
    assert found["difference"] == pytest.approx(0.25, abs=0.01)
    assert found["low"] < found["difference"] < found["high"]
    assert (found["seeds"], found["examples"]) == (3, EXAMPLES)
    assert part["paper"] == "CLIP 0.612 / 0.598"
    short = json.loads((tmp_path / "metrics/findings.json").read_text())
    assert short["finding_1"]["verdicts"] == both


def test_what_goes_the_other_way_is_reversed(tmp_path, study):
    def mean(variant, set_, method):
        value = _as_in_the_paper(variant, set_, method)
        return 1 - value if set_.startswith("story_5") else value

    _, verdicts = _run(tmp_path, study, mean, recall=0.05)
    assert verdicts[1]["oracle_attributes"] == "reversed"
    assert verdicts[3]["clip_similarity"] == "reversed"
    assert verdicts[4] == {"recall": "reversed"}
    assert verdicts[5] == {"macro_f1": "seen"}


def test_where_nothing_is_different_better_is_not_seen_and_equal_is(tmp_path, study):
    _, verdicts = _run(tmp_path, study, lambda variant, set_, method: 0.5, recall=0.1)
    assert verdicts[1]["oracle_attributes"] == "not seen"
    assert verdicts[2]["oracle_attributes"] == "not seen"
    assert verdicts[3]["oracle_attributes"] == "not seen"
    assert verdicts[4] == {"recall": "not seen"}
    assert verdicts[6] == {"oracle_attributes": "seen", "clip_similarity": "seen"}


def test_one_seed_has_numbers_and_no_verdict(tmp_path, study, capsys):
    content, verdicts = _run(tmp_path, study, seeds=(0,))
    assert {verdict for by in verdicts.values() for verdict in by.values()} == {None}
    found = content["findings"][0]["parts"][1]["by"]["clip_similarity"]
    assert found["difference"] == pytest.approx(0.25, abs=0.01)
    out = capsys.readouterr().out
    assert "no verdict" in out
    assert "18 of 27 cells are not there" in out


def test_a_missing_variant_leaves_its_finding_open_and_no_other(tmp_path, study):
    artifacts = Artifacts(tmp_path / "artifacts")
    content, _ = _run(tmp_path, study)
    for seed in study.seeds:
        cell("generation_only", seed, artifacts).record.unlink()
    findings.run(tmp_path / "params.yaml", study, artifacts, tmp_path / "metrics")
    content = json.loads((artifacts.findings / "findings.json").read_text())
    verdicts = {found["number"]: found["verdicts"] for found in content["findings"]}
    assert verdicts[6] == {"oracle_attributes": None, "clip_similarity": None}
    assert verdicts[1]["oracle_attributes"] == "seen"


def test_numbers_over_seeds_have_mean_deviation_and_interval(tmp_path, study):
    content, _ = _run(tmp_path, study)
    rows = {(r["variant"], r["set"], r["method"], r["metric"]): r for r in content["numbers"]}
    row = rows["gill", "decision", "linear", "macro_f1"]
    assert row["mean"] == pytest.approx(np.mean(row["values"]))
    assert row["deviation"] == pytest.approx(np.std(row["values"], ddof=1))
    row = rows["linear", "story_5_pictures", "gill", "oracle_attributes"]
    assert len(row["values"]) == 3
    spread = 1.96 * 0.051 / np.sqrt(EXAMPLES)
    assert row["high"] - row["low"] == pytest.approx(2 * spread, rel=0.5)
    assert (row["high"] + row["low"]) / 2 == pytest.approx(0.6, abs=0.03)


def test_without_cells_it_says_what_to_run(tmp_path, study):
    with pytest.raises(StageError, match="stages run-variants"):
        findings.run(tmp_path / "p.yaml", study, Artifacts(tmp_path / "a"), tmp_path / "m")


def test_only_examples_that_both_have_are_compared(tmp_path):
    artifacts = Artifacts(tmp_path)
    cells = [cell(name, 0, artifacts) for name in ("gill", "r4")]
    for one, ids in zip(cells, ("abc", "bcd"), strict=True):
        records = [
            Record(set="s", id=i, prompt="", context=(), scores={"gill.clip_similarity": ord(i)})
            for i in ids
        ]
        write_records(one.artifacts.evaluation / "records.parquet", records)
    first, second = CellScores(cells).per_example(
        [Term("gill", "s", "gill"), Term("r4", "s", "gill")], "clip_similarity"
    )
    assert first.tolist() == second.tolist() == [[ord("b"), ord("c")]]
    assert CellScores(cells).per_example([Term("gill", "t", "gill")], "clip_similarity") is None


def test_every_claim_is_of_a_set_that_a_cell_measures():
    """A name that no cell has would leave a finding without a verdict for ever."""
    sets = {*SETS, "decision"}
    for finding in CLAIMED.findings:
        for part in finding.parts:
            for term in part.first + part.second:
                assert term.set in sets
                assert term.variant in VARIANTS
        assert any(not part.beside for part in finding.parts)
