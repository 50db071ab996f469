"""Makes `typer stages precompute-targets` work, besides `typer stages run precompute-targets`.

Typer's own command puts a module's app under `run`. When it imports `stages`, the commands of the
app are added to the group that is running, so that both spellings do the same. Where Typer keeps
its context has moved between versions; whatever is not found is left alone.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer


def offer_commands(app: typer.Typer) -> None:
    """Add the commands of `app` to Typer's own command line, when that is what imports us."""
    group = _running_group()
    if group is None:
        return
    commands = getattr(typer.main.get_command(app), "commands", {})
    for name, command in commands.items():
        group.commands.setdefault(name, command)


def _running_group() -> Any | None:
    """The command group of the `typer` executable importing us, or None."""
    if "typer.cli" not in sys.modules:
        return None
    for module in ("typer._click.globals", "click.globals"):
        try:
            context = importlib.import_module(module).get_current_context(silent=True)
        except (ImportError, AttributeError):
            continue
        group = getattr(context, "command", None)
        if type(group).__name__ == "TyperCLIGroup":
            return group
    return None
