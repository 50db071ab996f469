"""docs/howto/experiments.md, line by line: nothing computed twice, nothing finished lost.

One small project made by `stages init`, driven by DVC's own command line.
Minutes long, so not among the ordinary tests: `make torture`.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.torture
SMALL = {
    "captions": {
        "miniature": {
            "pictures": 40,
            "held_out_pictures": 20,
            "stories": 4,
            "dialogues": 4,
            "prompts": 60,
        }
    },
    # What the released layout can hold.
    "model": {"mapper": {"encoder_layers": 2, "decoder_layers": 2, "adds_embedding": True}},
    "decision": {"folds": 2},
    "training": {"steps": 6, "batch_size": 8, "validate_every": 3},
    "run": {"log_every": 2, "checkpoint_every": 2},
}


def run(folder: Path, *words: str, check: bool = True) -> str:
    """What a command prints, both streams; run as in a shell whose PATH has the environment."""
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert not check or done.returncode == 0, f"{words}: {said}"
    return said


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    changes = {"PATH": path, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    return {k: v for k, v in os.environ.items() if k != "GILL_WORK"} | changes


def commit(folder: Path, message: str) -> None:
    run(folder, "git", "add", "-A")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    run(folder, "git", *who, "commit", "-qm", message)


def kill(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End a `dvc` command and its stage as a lost machine would, and clear DVC's own locks."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for lock in (folder / ".dvc" / "tmp").glob("*lock*"):
        lock.unlink()


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def model_bytes(folder: Path) -> bytes:
    return (folder / "artifacts" / "model" / "last.safetensors").read_bytes()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with git, where `dvc repro` has run once and everything is committed."""
    folder = tmp_path_factory.mktemp("project")
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.email", "a@b.c")
    run(folder, "git", "config", "user.name", "a")
    run(folder, "stages", "init")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for section, values in SMALL.items():
        params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    commit(folder, "begin")
    run(folder, "dvc", "repro")
    commit(folder, "first run")
    return folder


def test_right_after_a_run_all_is_up_to_date(project: Path) -> None:
    assert "up to date" in run(project, "dvc", "repro")
    assert "Data and pipelines are up to date." in run(project, "dvc", "status")


def test_an_experiment_and_back_is_no_computation(project: Path) -> None:
    first = model_bytes(project)
    said = run(project, "dvc", "exp", "run", "-n", "r4", "-S", "model.r=4", "train")
    assert "step 6/6" in said
    assert "rows/s" not in said.split("precompute")[-1]
    assert model_bytes(project) != first
    run(project, "git", "checkout", "-q", "--", "params.yaml", "dvc.lock")
    said = run(project, "dvc", "repro", "train")
    assert "step" not in said.replace("stage", "")
    assert model_bytes(project) == first
    assert "r4" in run(project, "dvc", "exp", "show", "--only-changed", "--csv")


def test_a_workspace_of_its_own_encodes_nothing(project: Path) -> None:
    said = run(project, "dvc", "exp", "run", "--temp", "-n", "r2", "-S", "model.r=2", "train")
    assert "step 6/6" in said
    assert "this run encoded" not in said
    assert "drawing" not in said


def test_a_killed_experiment_goes_on_from_its_state(project: Path) -> None:
    words = ["dvc", "exp", "run", "-n", "k2", "-S", "model.k=2", "-S", "training.steps=40", "train"]
    process = start(project, *words)
    before = set((project / "work" / "training").glob("*/state.safetensors"))
    until = time.monotonic() + 120
    while not set((project / "work" / "training").glob("*/state.safetensors")) - before:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    kill(process, project)
    said = run(project, *words)
    assert "going on from the last state" in said
    run(project, "git", "checkout", "-q", "--", "params.yaml", "dvc.lock")
    run(project, "dvc", "repro", "train")


def test_killed_at_any_moment_it_ends_with_the_same_bytes(project: Path) -> None:
    words = ["dvc", "exp", "run", "-f", "-n", "k3", "-S", "model.k=3", "-S", "training.steps=30"]
    moments = random.Random(0)
    for _ in range(5):
        process = start(project, *words, "train")
        time.sleep(moments.uniform(1, 20))
        kill(process, project)
    run(project, *words, "train")
    interrupted = model_bytes(project)
    run(project, "stages", "train", "--anew")
    assert model_bytes(project) == interrupted
    run(project, "git", "checkout", "-q", "--", "params.yaml", "dvc.lock")
    run(project, "dvc", "repro", "train")


def test_two_queued_experiments_run_side_by_side_and_are_compared(project: Path) -> None:
    for k in (5, 6):
        run(project, "dvc", "exp", "run", "--queue", "-n", f"q{k}", "-S", f"model.k={k}")
    run(project, "dvc", "queue", "start", "-j", "2")
    until = time.monotonic() + 300
    while (status := run(project, "dvc", "queue", "status")).count("Success") < 2:
        assert "Failed" not in status, run(project, "dvc", "queue", "logs", "q5", check=False)
        assert time.monotonic() < until, status
        time.sleep(2)
    for name in ("q5", "q6"):
        said = run(project, "dvc", "queue", "logs", name)
        assert "step 6/6" in said
        assert "this run encoded" not in said
    run(project, "dvc", "queue", "stop", "--kill")
    assert "model.k" in run(project, "dvc", "exp", "diff", "q5", "q6")
    table = run(project, "dvc", "exp", "show", "--only-changed", "--csv")
    assert {"q5", "q6"} <= {word for line in table.splitlines() for word in line.split(",")}
    run(project, "dvc", "exp", "apply", "q5")
    assert yaml.safe_load((project / "params.yaml").read_text())["model"]["k"] == 5
    run(project, "git", "checkout", "-q", "--", ".")
    assert "step" not in run(project, "dvc", "repro").replace("stage", "")


def test_a_second_clone_shares_the_work_folder(project: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(project), str(clone))
    run(clone, "stages", "check-params")
    env = environment() | {"GILL_WORK": str(project / "work")}
    done = subprocess.run(
        ["dvc", "repro", "train"], cwd=clone, env=env, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "this run encoded" not in said
    assert "nothing to do: trained before" in said
    assert model_bytes(clone) == model_bytes(project)


def test_the_work_folder_is_listed_and_pruned(project: Path) -> None:
    said = run(project, "stages", "work")
    assert "training/" in said
    assert "features/" in said
    run(project, "stages", "work", "--prune")
    assert "nothing to do" in run(project, "stages", "train")


def test_a_colleague_pulls_and_talks_with_nothing_encoded(project: Path, tmp_path: Path) -> None:
    run(project, "dvc", "remote", "add", "-f", "-d", "store", str(tmp_path / "store"))
    commit(project, "a remote")
    run(project, "dvc", "push")
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(project), str(clone))
    run(clone, "dvc", "pull")
    assert not list((clone / "work").glob("features*"))
    talked = run(clone, "gill", "ask", "--want", "generate", "on the beach a small red ring.")
    assert "answer" in talked
    assert list((clone / "answer").rglob("*.png"))
    for stage in ("evaluate", "report"):
        said = run(clone, "stages", stage)
        assert "encoded" not in said, said
    numbers = "metrics/evaluation.json"
    assert (clone / numbers).read_bytes() == (project / numbers).read_bytes()


def test_released_weights_are_talked_to_by_the_readmes_commands(
    project: Path, tmp_path: Path
) -> None:
    released = tmp_path / "released"
    run(project, "stages", "export-released", str(released))
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(project), str(clone))
    shutil.rmtree(clone / "artifacts", ignore_errors=True)
    run(clone, "stages", "import-released", str(released))
    said = run(clone, "dvc", "repro")
    assert "nothing is trained" in said
    ours, theirs = (
        load_file(folder / "artifacts" / "model" / "last.safetensors")
        for folder in (project, clone)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "answer" in run(
        clone, "gill", "ask", "--want", "generate", "on the beach a small red ring."
    )
