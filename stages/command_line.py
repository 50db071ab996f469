"""What both command lines have in common: quiet libraries, and errors in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from gill_errors import GillError

# Nothing calls home: hub ids are fetched only where backbones.allow_download says so.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class OneLineErrors(TyperCommand):
    """A command in which what a person can mend is one line and exit code 1, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what a person can mend is one line, and exit code 1."""
        try:
            return super().invoke(ctx)
        except GillError as failure:
            hint = " (here: --rebuild)" if type(failure).__name__ == "StoreMismatchError" else ""
            typer.secho(f"error: {failure}{hint}", fg="red", err=True)
            raise typer.Exit(1) from None


class CommandLine(typer.Typer):
    """A group of commands that are shown and fail alike."""

    def __init__(self, *, help: str, kind: type[OneLineErrors] = OneLineErrors) -> None:
        super().__init__(
            no_args_is_help=True,
            pretty_exceptions_show_locals=False,
            add_completion=False,
            help=help,
        )
        self._kind = kind

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """A decorator, as Typer's."""
        return super().command(*args, cls=self._kind, **options)
