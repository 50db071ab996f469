"""The Typer app `stages`: one command per stage of dvc.yaml, and a few to look and to move data.

Imports that cost seconds wait until a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import typer

app = typer.Typer()


@app.callback()
def cb() -> None:
    "Stages."


@app.command()
def precompute_targets(x: int = 0) -> None:
    "Targets"
    print("targets", x)
