"""Two variants with two seeds through the real code, on a very small world: shared caches, a
killed cell, stale cells, verdicts on what came out, and the report on them."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from evaluation.variants import cell
from gill.artifacts import Artifacts
from gill_errors import StageError
from stages import ablations, run_variants
from stages.cli import app

ROOT = Path(__file__).parents[1]
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
        "r2": {"title": "r = 2", "params": {"model": {"r": 2}}},
    },
}


def _run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, f"{words}: {result.output}\n{result.exception}"
    return result.output


def _variant(name: str, seed: int) -> str:
    return _run("run-variant", name, "--seed", str(seed), "--variants", "study.yaml")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A folder with caches and three of four cells."""
    folder = tmp_path_factory.mktemp("cells")
    raw = yaml.safe_load((ROOT / "presets/miniature.yaml").read_text(encoding="utf-8"))
    sizes = {"pictures": 30, "held_out_pictures": 12, "stories": 3, "dialogues": 3, "prompts": 40}
    raw["captions"]["miniature"] = sizes
    raw["training"] = {"steps": 2, "batch_size": 8}
    raw["run"] |= {"log_every": 1, "batch_sizes": {"pictures": 16}}
    raw["generation"] = {"steps": 1, "guidance": 1.0}
    raw["evaluation"] = {"captions": 3, "examples_shown": 2, "tables": ["captions", "table_1"]}
    raw["decision"] = {"votes": "votes.tsv"}  # two steps make no pictures to vote for
    lines = ["Prompt\tCategory\tChallenge\tNote\tDecisions"]
    lines += [f"a ring {i}\tA\tB\tC\t{','.join([['gen', 'ret'][i % 2]] * 5)}" for i in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        Path("votes.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        Path("study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
        for stage in (
            *("prepare-captions", "prepare-backbones", "precompute-features"),
            *("precompute-targets", "train", "build-index", "fit-decision", "evaluate"),
        ):
            _run(stage)
        for name, seed in (("gill", 0), ("gill", 1), ("r2", 0)):
            assert "finished before" not in _variant(name, seed)
        yield folder


def test_cells_have_their_own_heads_and_no_copy_of_the_caches(cells):
    heads = [
        (cells / f"artifacts/findings/{name}/model/last.safetensors").read_bytes()
        for name in ("gill/0", "gill/1", "r2/0")
    ]
    assert len({*heads}) == 3
    for name in ("*.zarr", "captions.parquet", "backbones", "miniature"):
        assert not list((cells / "artifacts/findings").rglob(name))
    record = json.loads((cells / "artifacts/findings/r2/0/cell.json").read_text())
    assert record["params"]["model"]["r"] == 2
    assert set(record["seconds"]) == {"train", "evaluate"}


def test_a_finished_cell_is_not_run_again_and_a_stale_one_is(cells, monkeypatch):
    monkeypatch.chdir(cells)
    heads = cells / "artifacts/findings/r2/0/model/last.safetensors"
    made = heads.stat().st_mtime_ns
    assert "finished before" in _variant("r2", 0)
    assert heads.stat().st_mtime_ns == made
    changed = yaml.safe_load(Path("params.yaml").read_text())
    changed["training"]["learning_rate"] = 0.01
    Path("other.yaml").write_text(yaml.safe_dump(changed))
    kept = shutil.copytree(heads.parents[1], cells / "kept")
    try:
        words = ["run-variant", "r2", "--variants", "study.yaml", "--params", "other.yaml"]
        assert "finished before" not in _run(*words)
        assert heads.stat().st_mtime_ns != made
    finally:
        shutil.rmtree(heads.parents[1])
        shutil.move(kept, heads.parents[1])


def test_a_killed_cell_goes_on_after_its_training(cells, monkeypatch):
    monkeypatch.chdir(cells)
    one = cell("r2", 0)
    kept = shutil.copytree(one.folder, cells / "kept")
    try:
        one.record.unlink()
        shutil.rmtree(one.artifacts.evaluation)
        made = (one.artifacts.model / "last.safetensors").stat().st_mtime_ns
        assert "finished before" not in _variant("r2", 0)
        assert (one.artifacts.model / "last.safetensors").stat().st_mtime_ns == made
        assert one.record.is_file()
    finally:
        shutil.rmtree(one.folder)
        shutil.move(kept, one.folder)


def test_the_pool_runs_what_is_not_finished_and_the_findings_follow(cells, monkeypatch):
    """The fourth cell runs in a process of its own; then there are two seeds of everything."""
    monkeypatch.chdir(cells)
    output = _run("run-variants", "--variants", "study.yaml", "--jobs", "2")
    assert "4 cells, 3 finished before; 2 at a time" in output
    assert "[1/1] r2, seed 1: finished" in output
    assert "r2, seed 1: evaluate" in cell("r2", 1).log.read_text()
    assert "4 cells, 4 finished before" in _run("run-variants", "--variants", "study.yaml")

    _run("findings", "--variants", "study.yaml")
    content = json.loads((cells / "artifacts/findings/findings.json").read_text())
    assert content["cells"]["seeds"] == [0, 1]
    verdicts = {found["number"]: found["verdicts"] for found in content["findings"]}
    assert verdicts[1]["oracle_attributes"] is None  # no dialogues were measured
    tokens = {part["title"]: part for part in content["findings"][2]["parts"]}
    assert not tokens["captions: r=4 against r=2"]["by"]
    decision = content["findings"][4]["parts"][0]["by"]["macro_f1"]
    assert decision["seeds"] == 2
    assert decision["verdict"] in ("seen", "not seen", "reversed")

    _run("report")
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
    assert all(one.process.poll() is not None for one in started)


def test_without_git_ablations_say_that_there_are_no_experiments(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "findings").mkdir()
    shutil.copy(ROOT / "findings/variants.yaml", "findings/variants.yaml")
    ran = []
    monkeypatch.setattr(ablations.run_variants, "run", lambda *a, **k: ran.append(k["seeds"]))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    ablations.run(Path("params.yaml"), seed=0, jobs=2)
    assert ran == [[0]]
    assert "no git repository" in capsys.readouterr().out


def test_the_shared_root_is_the_one_above_the_findings():
    one = cell("r2", 1, Artifacts(Path("somewhere/artifacts")))
    assert one.artifacts.features == Path("somewhere/artifacts/features.zarr")
