"""The command lines: both spellings, help that says what is read and written, clear errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.settings import Objective
from settings.params import ParamsError, read_params
from stages.cli import app

ROOT = Path(__file__).parents[1]
STAGES = sorted(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.mark.parametrize("stage", STAGES)
def test_help_says_what_a_stage_reads_and_writes(stage):
    result = CliRunner().invoke(app, [stage, "--help"])
    assert result.exit_code == 0
    assert "Reads" in result.output
    assert "Writes" in result.output


@pytest.mark.parametrize(
    ("set_before", "seen"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, None),
    ],
)
def test_memory_of_a_gpu_grows_in_segments_unless_set_otherwise(monkeypatch, set_before, seen):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    told = []

    class Stage:
        @staticmethod
        def run(params):
            told.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))

    monkeypatch.setattr("stages.cli.import_module", lambda name: Stage)
    result = CliRunner().invoke(app, ["report", "--params", str(ROOT / "params.yaml")])
    assert result.exit_code == 0, result.output
    assert told == [seen]


def test_that_setting_comes_before_torch():
    """Which reads it when it is imported."""
    code = "import sys, stages.cli, settings.params; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "torch" not in ran.stdout.split()


@pytest.mark.parametrize(
    ("module", "needless"),
    [
        ("head_training", "diffusers open_clip faiss sklearn"),
        ("candidate_index", "transformers diffusers open_clip sklearn"),
    ],
)
def test_a_stage_imports_no_library_that_it_does_not_need(module, needless):
    """Each costs every run seconds."""
    code = f"""import sys, stages.{module} as stage
getattr(stage, "set_up", print)("cpu", 1)
print(*sys.modules)"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(needless.split()) & set(ran.stdout.split())


def test_the_report_needs_no_torch():
    code = "import sys, evaluation.report.page; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "sklearn", "faiss"} & set(ran.stdout.split())


@pytest.mark.parametrize("words", [["stages"], ["stages", "run"]])
def test_typer_takes_both_spellings(words):
    typer = Path(sys.executable).with_name("typer")
    result = subprocess.run(
        [typer, *words, "precompute-targets", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "targets of Eq. 3" in result.stdout


@pytest.mark.parametrize("preset", [ROOT / "params.yaml", *PRESETS], ids=lambda path: path.name)
def test_presets_are_valid(preset):
    read_params(preset)


@pytest.mark.parametrize("preset", [ROOT / "params.yaml", *PRESETS], ids=lambda path: path.name)
def test_presets_hold_every_key_that_dvc_tracks(preset):
    """DVC refuses to run a stage one of whose declared params is absent."""
    raw = yaml.safe_load(preset.read_text(encoding="utf-8"))
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values():
        for key in stage["params"]:
            value = raw
            for part in key.split("."):
                assert part in value, f"{preset.name} lacks {key}"
                value = value[part]


def test_the_default_is_the_miniature_preset():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "presets/miniature.yaml").read_text()


def test_the_presets_name_the_paper_and_the_released_objective():
    assert read_params(ROOT / "presets/paper.yaml").objective == Objective.paper()
    assert read_params(ROOT / "presets/released.yaml").objective == Objective.released()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"training": {"lerning_rate": 1}},
            ["training.lerning_rate", "unknown key", "learning_rate"],
        ),
        ({"trainig": {}}, ["trainig", "unknown key", "training"]),
        ({"training": {"steps": 0}}, ["training.steps", "greater than or equal to 1", "0"]),
        ({"model": {"mapper": {"kind": "magic"}}}, ["model.mapper.kind", "gill_mapper", "magic"]),
        ({"captions": {"check": "maybe"}}, ["captions.check", "decode", "maybe"]),
    ],
)
def test_wrong_params_are_named_with_the_file_and_what_is_allowed(tmp_path, change, words):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in change.items():
        raw.setdefault(section, {}).update(values)
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError) as failure:
        read_params(file)
    for word in ["params.yaml", *words]:
        assert word in str(failure.value)
    result = CliRunner().invoke(app, ["train", "--params", str(file)])
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_a_missing_params_file_says_where_to_get_one(tmp_path):
    with pytest.raises(ParamsError, match=r"is missing.*`stages init`"):
        read_params(tmp_path / "params.yaml")
