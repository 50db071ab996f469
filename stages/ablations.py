"""Command ablations: every variant with one seed, each kept as a DVC experiment.

The cells run first, several at a time, on the caches of the main run. Then each is saved as an
experiment of its own name: params.yaml with its changes, and its headline numbers, so that
`dvc exp show` has them side by side.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from evaluation.variants import VARIANTS, Study, cell, cell_values, read_study
from gill.artifacts import METRICS
from gill_errors import StageError
from stages import run_variants
from stages.run_variant import cell_headline
from workfolder import write_json


def run(params_file: Path, *, seed: int, jobs: int) -> None:
    """Run what is not finished, then keep all of it as experiments where there is a git repository.

    Raises StageError when a cell, or DVC, fails.
    """
    study = read_study(VARIANTS)
    run_variants.run(params_file, VARIANTS, seeds=[seed], jobs=jobs)
    if _run(["git", "rev-parse", "--verify", "HEAD"]).returncode:
        print(
            "no git repository with a commit here: DVC keeps no experiments (git init, git commit)"
        )
        return
    numbers = METRICS / "gill.json"
    written = (params_file, numbers, Path("dvc.lock"))  # the last by DVC itself
    before = {path: path.read_bytes() for path in written if path.is_file()}
    try:
        for name in study.variants:
            _save(params_file, study, name, seed, numbers)
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    print("side by side: make experiments")


def _save(params_file: Path, study: Study, name: str, seed: int, numbers: Path) -> None:
    """One experiment; one of the same name is replaced."""
    text = yaml.safe_dump(cell_values(params_file, study, name, seed), sort_keys=False)
    params_file.write_text(text, encoding="utf-8")
    write_json(numbers, cell_headline(cell(name, seed)))
    words = ["exp", "save", "--quiet", "--force", "--name", f"ablation-{name}"]
    found = _run([sys.executable, "-m", "dvc", *words])
    if found.returncode:
        raise StageError(f"dvc {' '.join(words)} failed: {found.stderr.strip()[-600:]}")
    print(f"experiment ablation-{name}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # The stages' command lies beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} is not installed")
