"""Two variants with two seeds through the real code, on a very small world: shared caches, a
killed cell, stale cells, verdicts on what came out, and the report on them."""

import inspect
import json
import os
import shutil
import threading
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from safetensors.torch import load
from stage_runs import ROOT, run, write_params

from evaluation.variants import cell, read_study
from gill.artifacts import Artifacts
from gill_errors import StageError
from stages import ablations, preset_findings, run_variant, run_variants

STUDY = {
    "seeds": [0, 1],
    "common": {"evaluation": {"tables": ["captions", "table_1"], "methods": ["gill"]}},
    "variants": {
        "gill": {
            "title": "GILL",
            "stages": ["train", "build-index", "fit-decision", "evaluate"],
            "params": {
                "evaluation": {
                    "tables": ["captions", "table_1", "table_6"],
                    "methods": ["generator", "gill"],
                }
            },
        },
        "r2": {"title": "r = 2", "captioning_of": "gill", "params": {"model": {"r": 2}}},
    },
}


SIZES = {"pictures": 30, "held_out_pictures": 12, "stories": 3, "dialogues": 3, "prompts": 2}
R2 = ("run-variant", "r2", "--seed", "0", "--variants", "study.yaml")


def _params() -> None:
    write_params(
        captions={"miniature": SIZES},
        training={"steps": 2},
        generation={"steps": 1, "guidance": 1.0},
        decision={"votes": "votes.tsv"},  # two steps make no pictures to vote for
        evaluation={"captions": 3, "examples_shown": 2, "tables": ["captions", "table_1"]},
    )


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A folder with caches and three of four cells."""
    folder = tmp_path_factory.mktemp("cells")
    lines = ["Prompt\tCategory\tChallenge\tNote\tDecisions"]
    lines += [f"a ring {i}\tA\tB\tC\t{','.join([['gen', 'ret'][i % 2]] * 5)}" for i in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _params()
        Path("votes.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        Path("study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
        for stage in (
            *("prepare-captions", "prepare-backbones", "precompute-features"),
            *("precompute-targets", "train", "build-index", "fit-decision", "evaluate"),
        ):
            run(stage)
        for name, seed in (("gill", 0), ("gill", 1), ("r2", 0)):
            said = run("run-variant", name, "--seed", str(seed), "--variants", "study.yaml")
            assert f"{name}, seed {seed}: train" in said
        yield folder


def test_cells_have_their_own_heads_and_no_copy_of_the_caches(cells):
    heads = [
        (cells / f"artifacts/findings/{name}/model/last.safetensors").read_bytes()
        for name in ("gill/0", "gill/1", "r2/0")
    ]
    assert len({*heads}) == 3
    captioning = [load(one)["caption_projection.weight"] for one in heads]
    assert captioning[2].equal(captioning[0]), "W_cap is trained once for each seed"
    assert not captioning[1].equal(captioning[0])
    for name in ("*.zarr", "captions.parquet", "backbones", "miniature"):
        assert not list((cells / "artifacts/findings").rglob(name))
    record = json.loads((cells / "artifacts/findings/r2/0/cell.json").read_text())
    assert record["params"]["model"]["r"] == 2
    assert set(record["seconds"]) == {"train", "evaluate"}


def test_a_finished_cell_is_not_run_again_and_a_stale_one_is(cells, monkeypatch):
    monkeypatch.chdir(cells)
    heads = cell("r2", 0).artifacts.model / "last.safetensors"
    before, made = heads.read_bytes(), heads.stat().st_mtime_ns
    assert "r2, seed 0: finished before" in run(*R2)
    assert heads.stat().st_mtime_ns == made
    changed = yaml.safe_load(Path("params.yaml").read_text())
    changed["training"]["learning_rate"] = 0.01
    Path("other.yaml").write_text(yaml.safe_dump(changed))
    said = run(*R2, "--params", "other.yaml")
    assert "gill, seed 0: train" in said, "whose W_cap it takes"
    assert "r2, seed 0: train" in said
    assert "changed since: training.learning_rate" in said
    assert heads.read_bytes() != before
    said = run(*R2)
    assert "nothing to do: trained before" in said
    assert "nothing to do: made before" in said
    assert heads.read_bytes() == before


def test_a_killed_cell_goes_on_after_its_training(cells, monkeypatch):
    monkeypatch.chdir(cells)
    one = cell("r2", 0)
    before = (one.artifacts.model / "last.safetensors").read_bytes()
    one.record.unlink()
    shutil.rmtree(one.artifacts.root)
    said = run(*R2)
    assert "r2, seed 0: finished before" not in said
    assert "nothing to do: trained before" in said
    assert (one.artifacts.model / "last.safetensors").read_bytes() == before
    assert json.loads(one.record.read_text())["params"]["model"]["r"] == 2


def test_the_pool_runs_what_is_not_finished_and_the_findings_follow(cells, monkeypatch):
    """The fourth cell runs in a process of its own; then there are two seeds of everything."""
    monkeypatch.chdir(cells)
    output = run("run-variants", "--variants", "study.yaml", "--jobs", "2")
    assert "4 cells, 3 finished before; 2 at a time" in output
    assert "[1/1] r2, seed 1: finished" in output
    assert "r2, seed 1: evaluate" in cell("r2", 1).log.read_text()
    assert "4 cells, 4 finished before" in run("run-variants", "--variants", "study.yaml")

    run("findings", "--variants", "study.yaml")
    content = json.loads((cells / "artifacts/findings/findings.json").read_text())
    assert content["cells"]["seeds"] == [0, 1]
    verdicts = {found["number"]: found["verdicts"] for found in content["findings"]}
    assert verdicts[1]["oracle_attributes"] is None  # no dialogues were measured
    tokens = {part["title"]: part for part in content["findings"][2]["parts"]}
    assert not tokens["captions: r=4 against r=2"]["by"]
    decision = content["findings"][4]["parts"][0]["by"]["macro_f1"]
    assert decision["seeds"] == 2
    assert decision["verdict"] in ("seen", "not seen", "reversed")

    run("report")
    page = (cells / "artifacts/report/index.html").read_text()
    for words in ("miniature world", "2 seeds", "Table 8", "Figure 6", "val2017", "no verdict",
                  "CLIP similarity", "Failures", "visdial_1.0_val.json"):  # fmt: skip
        assert words in page, words
    assert page.count("data:image/png;base64") > 20


def test_a_failing_cell_is_named_with_its_log(cells, monkeypatch):
    monkeypatch.chdir(cells)
    broken = {"seeds": [0], "variants": {"broken": {"title": "", "stages": ["build-index"]}}}
    Path("broken.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(StageError, match=r"1 of 1 cells failed: broken, seed 0 \(.*log\.txt\)"):
        run_variants.run(Path("params.yaml"), Path("broken.yaml"), jobs=2)
    assert "last.safetensors" in cell("broken", 0).log.read_text()
    shutil.rmtree(cell("broken", 0).folder.parent)


def test_a_stopped_pool_stops_its_cells(cells, monkeypatch):
    """Ctrl-C must leave no process behind that goes on writing."""
    monkeypatch.chdir(cells)
    started = []
    start = run_variants._start

    def remember(files, one):
        started.append(start(files, one))
        return started[-1]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_variants, "_start", remember)
    monkeypatch.setattr(run_variants.time, "sleep", stop)
    study = STUDY | {"seeds": [7]}
    Path("seven.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(KeyboardInterrupt):
        run_variants.run(Path("params.yaml"), Path("seven.yaml"), jobs=2)
    assert len(started) == 2
    assert all(one.process.exitcode is not None for one in started)


def test_without_git_ablations_say_that_there_are_no_experiments(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "findings").mkdir()
    _params()
    shutil.copy(ROOT / "findings/variants.yaml", "findings/variants.yaml")
    ran: list[list[int]] = []
    monkeypatch.setattr(ablations.run_variants, "run", lambda *a, **k: ran.append(k["seeds"]))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    ablations.run(Path("params.yaml"), seed=0, jobs=2)
    assert ran == [[0]]
    assert "no git repository" in capsys.readouterr().out


def test_the_shared_root_is_the_one_above_the_findings():
    one = cell("r2", 1, Artifacts(Path("somewhere/artifacts")))
    assert one.artifacts.features == Path("somewhere/artifacts/features.zarr")


def test_a_cell_waits_for_the_process_that_runs_it(cells, monkeypatch):
    """One that outlived a killed pool must not share its folder with the next pool's."""
    monkeypatch.chdir(cells)
    order, asked = [], threading.Event()

    class Asking(FileLock):
        def acquire(self, *args, **kwargs):
            asked.set()
            return super().acquire(*args, **kwargs)

    def finished(*_):
        order.append("second")
        return True

    monkeypatch.setattr(run_variant, "FileLock", Asking)
    monkeypatch.setattr(run_variant, "is_finished", finished)
    study = read_study(Path("study.yaml"))
    waiting = threading.Thread(target=run_variant.run, args=(Path("params.yaml"), study, "gill", 0))
    with FileLock(cell("gill", 0).folder.parent / "0.lock"):
        waiting.start()
        assert asked.wait(timeout=60)
        order.append("first")
    waiting.join(timeout=60)
    assert order == ["first", "second"]


def test_a_preset_runs_in_a_folder_of_its_own_on_the_same_work_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GILL_WORK", raising=False)
    shutil.copytree(ROOT / "findings", "findings")
    seen = []

    def watch(module, name):
        taken = inspect.signature(module.run)

        def look(*given, **named):
            taken.bind(*given, **named)  # a call that the real one would refuse fails here, too
            seen.append((name, Path.cwd().relative_to(tmp_path), os.environ["GILL_WORK"], given))

        monkeypatch.setattr(module, "run", look)

    for stage in preset_findings._SHARED:
        watch(import_module(f"stages.{stage}"), stage)
    watch(run_variants, "cells")
    watch(preset_findings.findings, "findings")
    preset_findings.run("smollm2", jobs=2, seeds=[1])
    assert [name for name, *_ in seen] == [*preset_findings._SHARED, "cells", "findings"]
    own = Path("artifacts/presets/smollm2")
    assert {folder for _, folder, *_ in seen} == {own}
    assert {work for _, _, work, _ in seen} == {str(tmp_path / "work")}
    assert "GILL_WORK" not in os.environ
    assert Path.cwd() == tmp_path
    assert (own / "params.yaml").read_text() == (ROOT / "presets/smollm2.yaml").read_text()
    assert seen[0][3][0].model.turns == "chat"
    assert read_study(tmp_path / "findings/smollm2.yaml").variants.keys() == {"gill"}
    with pytest.raises(StageError, match=r"findings/paper\.yaml is missing"):
        preset_findings.run("paper", jobs=2)
