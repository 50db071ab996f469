"""Questions beyond the paper: their examples, what is counted, and the tables of their studies."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import beyond, findings, unseen_prompts
from evaluation.cell_scores import CellScores
from evaluation.memory import FactExample, fact_scores, memory
from evaluation.results import Record, Result, write_records, write_results
from evaluation.sets import EvaluationSet, Example
from evaluation.unseen_prompts import FORMS, _by_distance, _Judged
from evaluation.variants import Study, cell, cell_params, read_study
from gill.artifacts import Artifacts
from miniature.drawing import render
from miniature.language import stated, told_values
from miniature.vocabulary import MAX_POSITIONS, language_model_tokenizer
from miniature.world import ATTRIBUTES, SCENES, VALUES
from settings.params import ParamsError, read_params

ROOT = Path(__file__).parents[1]
NAMES = ("denoising", "memory", "unseen_prompts", "visual_tokens")


@pytest.fixture
def asked(monkeypatch):
    """The memory sets of every seventh scene: all values and all attributes."""
    examples = [Example(f"row {n}", ("a",), "a", "", scene) for n, scene in enumerate(SCENES[::7])]
    found = EvaluationSet("captions", "", examples, 600)
    monkeypatch.setattr("evaluation.memory.caption_set", lambda source, limit: found)
    return {one.name: one.examples for one in memory(None, len(examples))}


def test_a_fact_is_stated_once_so_many_rounds_from_the_end(asked):
    assert list(asked) == [
        "memory_1_of_1", "memory_5_of_5", "memory_20_of_20", "memory_1_of_20", "memory_5_of_20",
    ]  # fmt: skip
    for name, examples in asked.items():
        _, distance, _, rounds = name.split("_")
        for example in examples:
            told = example.prompt.split("\n")
            assert len(told) == int(rounds)
            about = [stated(one) for one in told]
            assert [n for n, known in enumerate(about, 1) if example.fact in known] == [
                int(rounds) - int(distance) + 1
            ]
            assert all(len(known) == 1 for known in about)
            # Every value that is told is the scene's.
            words = set(example.prompt.replace("?", " ").replace("\n", " ").split())
            told_of = {n: words & set(VALUES[n]) for n in stated(example.prompt)}
            told_of.pop("size", None)  # "is it big? no it is small" names both
            assert all(v == {getattr(example.scene, n)} for n, v in told_of.items())
    assert [e.fact for e in asked["memory_1_of_1"][:6]] == [*ATTRIBUTES, ATTRIBUTES[0]]


def test_distance_alone_differs_between_dialogues_of_one_length(asked):
    for groups in zip(*(asked[f"memory_{n}_of_20"] for n in (1, 5, 20)), strict=True):
        rounds = [sorted(one.prompt.split("\n")) for one in groups]
        assert rounds[0] == rounds[1] == rounds[2]
        assert len({one.prompt for one in groups}) == 3


def test_the_longest_dialogue_and_its_image_tokens_fit_the_language_model(asked):
    tokenizer = language_model_tokenizer()
    longest = max(len(tokenizer(e.prompt)["input_ids"]) for e in asked["memory_20_of_20"])
    begin, r = 1, read_params(ROOT / "params.yaml").model.r
    assert 200 < longest <= MAX_POSITIONS - begin - r


def test_a_fact_is_shown_where_the_oracle_reads_its_value(tmp_path):
    scene = SCENES[0]
    other = scene._replace(color=VALUES["color"][1])
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for path, pixels in zip(paths, render([scene, other], 0), strict=True):
        Image.fromarray(pixels).save(path)
    examples = [FactExample("a", (), "", "", scene, fact) for fact in ("color", "color", "shape")]
    one = EvaluationSet("memory_1_of_1", "", examples, 3)
    assert fact_scores(one, [*paths, paths[1]]) == {"fact_shown": [1.0, 0.0, 1.0]}
    assert fact_scores(EvaluationSet("captions", "", [Example("a", (), "", "")], 1), paths) == {}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_prompt_says_all_of_its_scene(form):
    rng = random.Random(0)
    for scene in SCENES[::5]:
        words = FORMS[form](scene, rng)
        assert stated(words) == set(ATTRIBUTES)
        if form != "dialogue":
            assert told_values(words) == scene._asdict()
    assert words.startswith({"request": ("show me", "draw"), "dialogue": "Q:"}.get(form, ""))


def _judged():
    """Prompt by prompt: clear for generating, near ties either way, both right, both wrong."""
    p = np.array([0.9, 0.6, 0.8, 0.1, 0.5])
    return _Judged(
        np.array([5, 5, 4, 5, 3]),
        np.array([2, 4, 5, 5, 3]),
        p,
        {"linear": p >= 0.5, "heuristic": np.array([True, False, False, False, True])},
    )


def test_prompts_are_scored_where_an_answer_is_better():
    judged = _judged()
    assert judged.labels.tolist() == ["gen", "gen", "ret", "ret", "same"]
    # Linear says gen, gen, gen, ret: F1 of gen 4/5, of ret 2/3.
    scores = judged.scores()["linear"].whole
    assert scores == pytest.approx({"macro_f1": (4 / 5 + 2 / 3) / 2, "accuracy": 3 / 4})


def test_near_ties_are_counted_apart():
    found = {(r.set, r.method, r.metric): r.value for r in _by_distance(_judged(), 0)}
    numbers = {key[0]: value for key, value in found.items() if key[2] == "prompts"}
    assert numbers == {"decision_apart_2": 1, "decision_apart_1": 2, "decision_both_right": 1,
                       "decision_both_wrong": 1}  # fmt: skip
    assert found["decision_apart_1", "linear", "accuracy"] == 0.5
    assert found["decision_apart_1", "heuristic", "accuracy"] == 0.5
    assert found["decision_apart_1", "linear", "confidence"] == pytest.approx(0.7)
    assert found["decision_both_right", "linear", "confidence"] == pytest.approx(0.9)
    assert ("decision_both_wrong", "linear", "accuracy") not in found, "no answer is better"


def test_without_a_classifier_it_says_so(tmp_path):
    gill = type("Untrained", (), {"decision": None, "index": None})()
    [row] = unseen_prompts.unseen_prompts(gill, tmp_path, tmp_path / "t.json", 0, lambda one: [])
    assert row.value is None
    assert "run `stages fit-decision`" in row.absent


def _result(set_, method, metric, value, ceiling=None):
    return Result("t", set_, set_, method, metric, value, None, None, None, 40, 40, ceiling=ceiling)


def test_a_study_has_a_table_with_intervals_over_seeds_and_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "is_done", lambda params, study, one: one.record.is_file())
    artifacts = Artifacts(tmp_path / "artifacts")
    columns = {
        "shown": "*/s/gill/fact_shown",
        "ceiling": "*/s/gill/fact_shown/ceiling",
        "F1": "*/d/linear/macro_f1",
        "prompts": "*/d/linear/prompts",
        "never measured": "*/d/linear/accuracy",
    }
    study = Study.model_validate(
        {
            "seeds": [0, 1, 2],
            "variants": {"a": {"title": "A"}, "b": {"title": "B"}},
            "tables": [{"title": "T", "note": "N.", "columns": columns}],
        }
    )
    rng = np.random.default_rng(0)
    shown = rng.random((3, 40)).round()
    for seed, f1 in enumerate((0.8, 0.9, 1.0)):
        one = cell("a", seed, artifacts)
        folder = one.artifacts.evaluation
        write_records(
            folder / "records.parquet",
            [
                Record("s", str(n), "", (), scores={"gill.fact_shown": value})
                for n, value in enumerate(shown[seed])
            ],
        )
        mean = float(shown[seed].mean())
        results = [_result("s", "gill", "fact_shown", mean, 1.0)]
        results += [_result("d", "linear", "macro_f1", f1), _result("d", "linear", "prompts", 50.0)]
        write_results(folder / "results.json", results)
        record = {"code": "c", "finished": "2026", "seconds": {}, "versions": {}}
        one.record.write_text(json.dumps(record))
    beyond.run(tmp_path / "params.yaml", study, "mine", artifacts)
    content = json.loads((artifacts.findings / "tables/mine.json").read_text())
    [table] = content["tables"]
    [row] = table["rows"]  # nothing is finished of b
    assert table["note"] == "N. Mean and 95% interval, 3 seeds."
    assert content["cells"]["notes"] == ["note: 3 of 6 cells are not there"]
    assert row[0] == "A"
    mean, low, high = (float(part.strip("[,]")) for part in row[1].split())
    assert mean == pytest.approx(shown.mean(), abs=6e-4)
    # 120 answers, of which a share is yes: 1.96 deviations of their mean, and more for the seeds.
    half = 1.96 * np.sqrt(mean * (1 - mean) / 120)
    assert half * 0.8 < mean - low < half * 2.5
    assert half * 0.8 < high - mean < half * 2.5
    # Student's t of three seeds: 4.303 times 0.1 / sqrt(3).
    assert row[2:] == ["1.000", "0.900 [0.652, 1.148]", "50 [50, 50]", None]


@pytest.mark.parametrize("name", NAMES)
def test_every_column_of_a_study_is_of_a_variant_that_measures_its_set(name):
    study = read_study(ROOT / f"findings/{name}.yaml")
    assert study.tables
    assert "gill" not in study.variants, "that is the cell of findings/variants.yaml"
    params = {v: cell_params(ROOT / "params.yaml", study, v, 1) for v in study.variants}
    for table in study.tables:
        for pattern in table.columns.values():
            for word in table.rows.values() or study.variants:
                variant, _, method, *_ = pattern.replace("*", word).split("/")
                assert method in (*params[variant].evaluation.methods, "linear", "heuristic",
                                  "always_generate", "always_retrieve")  # fmt: skip
    assert CellScores([]).seeds(["nothing"]) == []


def test_what_goes_beyond_the_paper_is_of_the_miniature_world_and_not_of_every_run(tmp_path):
    assert not {"memory", "unseen_prompts"} & set(
        read_params(ROOT / "params.yaml").evaluation.chosen(miniature=True)
    )
    path = tmp_path / "params.yaml"
    path.write_text("captions: {table: a.tsv}\nevaluation: {tables: [memory]}\n")
    with pytest.raises(ParamsError, match="evaluation.tables: memory is measured on the miniature"):
        read_params(path)
