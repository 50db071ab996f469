"""Stage ablations: every variant with one seed, each kept as a DVC experiment.

The cells run first, several at a time, on the caches of the main run; then `dvc exp run` of the
stage `experiment` (findings/dvc.yaml) finds each of them finished and keeps its params and numbers
under its name, so that `dvc exp show` has them side by side. DVC itself runs the experiments of a
workspace one after another, which would take twice as long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stages import run_variants
from stages.failures import StageError
from stages.variants import VARIANTS, read_study

STAGE = "findings/dvc.yaml:experiment"
CHOICE = Path("findings/params.yaml")
_NO_NUMBERS = r"\.(py|yaml)$"
"""Columns of `dvc exp show` that are hashes of files."""


def run(params_file: Path, *, seed: int, jobs: int) -> None:
    """Run what is not finished, then keep all of it as experiments where there is a git repository.

    Raises StageError when a cell, or DVC, fails.
    """
    names = list(read_study(VARIANTS).variants)
    run_variants.run(params_file, VARIANTS, seeds=[seed], jobs=jobs)
    if not _is_git_repository():
        print(
            "no git repository with a commit here: DVC keeps no experiments (git init, git commit)"
        )
        return
    chosen = CHOICE.read_bytes()
    try:
        for name in names:
            _keep(name, seed)
    finally:
        CHOICE.write_bytes(chosen)
    print(f"side by side: dvc exp show --only-changed --drop '{_NO_NUMBERS}'")


def _keep(name: str, seed: int) -> None:
    """One experiment; one of the same name is replaced."""
    changes = [f"{CHOICE}:variant={name}", f"{CHOICE}:seed={seed}"]
    words = ["exp", "run", "--quiet", "--force", "--single-item", "--name", f"ablation-{name}"]
    for change in changes:
        words += ["--set-param", change]
    found = _run([sys.executable, "-m", "dvc", *words, STAGE])
    if found.returncode:
        raise StageError(f"dvc {' '.join(words)} {STAGE} failed: {found.stderr.strip()[-600:]}")
    print(f"experiment ablation-{name}")


def _is_git_repository() -> bool:
    return _run(["git", "rev-parse", "--verify", "HEAD"]).returncode == 0


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # The stage's command is `stages`, which lies beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} is not installed")
