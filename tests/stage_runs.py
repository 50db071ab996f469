"""Running the stages on a very small world, in the working directory and in this process."""

from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from evaluation.variants import lay_over
from stages.cli import app

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "run": {
        "log_every": 1,
        "checkpoint_every": 2,
        "batch_sizes": {"features": 16, "targets": 16, "pictures": 16},
    },
    "training": {"steps": 4, "batch_size": 8, "validate_every": 2},
    "decision": {"folds": 2, "regularisation": [0.01, 1.0]},
    "generation": {"steps": 2, "guidance": 2.0},
}
"""Laid over a preset: seconds instead of minutes."""


def write_params(preset: str = "miniature", **changes: Any) -> None:
    """params.yaml: a preset made tiny, with changes laid over it section by section."""
    raw = yaml.safe_load((ROOT / f"presets/{preset}.yaml").read_text(encoding="utf-8"))
    raw = lay_over(lay_over(raw, TINY), changes)
    Path("params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")


def run(*words: str) -> str:
    """Run a command of `stages`, which must succeed; gives what it printed."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, f"{words}: {result.output}\n{result.exception!r}"
    return result.output


def refusal(*words: str) -> str:
    """Run a command of `stages`, which must end with an error for people; gives what it printed."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 1, f"{words}: {result.output}\n{result.exception!r}"
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "error: " in result.output
    return result.output
