"""`stages init`: a folder of one's own, in which every dependency of dvc.yaml exists."""

from pathlib import Path

import pytest
import yaml
from stage_runs import refusal, run

ROOT = Path(__file__).parents[1]


def dependencies(file: Path) -> set[str]:
    stages = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
    return {dep for stage in stages.values() for dep in stage["deps"]}


def test_every_dependency_is_made_by_a_stage_or_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Now: dvc repro" in run("init", "--preset", "paper")
    ours, theirs = dependencies(ROOT / "dvc.yaml"), dependencies(tmp_path / "dvc.yaml")
    own = ("artifacts/", "inputs/", "metrics/")
    code = {dep for dep in ours if not dep.startswith(own)}
    assert {"pipeline", "gill", "evaluation", "miniature/weights"} <= code
    assert theirs == (ours - code) | {f"inputs/code/{dep}" for dep in code}
    assert not Path("inputs/code/.dvc").exists()  # DVC overlooks a repository within another
    for dep in theirs:
        if dep.startswith("inputs/"):
            assert Path(dep).exists(), dep
    assert yaml.safe_load(Path("params.yaml").read_text())["model"]["m"] == 512
    assert "no_scm = true" in Path(".dvc/config").read_text()
    assert "vegaEmbed" in Path(".dvc/plots.html").read_text()


def test_a_table_is_named_and_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no such file" in refusal("init", "--preset", "photos", "--table", "no.tsv")
    Path("my.tsv").write_text("caption\timage\n")
    run("init", "--preset", "photos", "--table", "my.tsv")
    assert yaml.safe_load(Path("params.yaml").read_text())["captions"]["table"] == "my.tsv"


def test_what_is_there_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("mine: 1\n")
    said = refusal("init")
    assert "params.yaml: there already" in said
    assert Path("params.yaml").read_text() == "mine: 1\n"
    assert "there are miniature, paper, photos" in refusal("init", "--preset", "nope")


def test_in_a_clone_only_the_link_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("init")
    link = Path("inputs/code")
    link.unlink()
    link.symlink_to("/nowhere")
    story = Path("dvc.yaml").read_bytes()
    assert "nothing else was changed" in run("init")
    assert (link / "pipeline").resolve() == ROOT / "pipeline"
    assert Path("dvc.yaml").read_bytes() == story
