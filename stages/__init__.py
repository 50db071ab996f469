"""The stages of dvc.yaml as commands: thin wrappers that read paths and params, call, and write.

`stages` is the console script; `typer stages COMMAND` does the same.
"""

from stages.cli import app
from stages.typer_adapter import offer_commands

offer_commands(app)

__all__ = ["app"]
