"""What both command lines have in common: quiet libraries, errors in one line, a quick end."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from gill_errors import GillError

# Nothing calls home: hub ids are fetched only where backbones.allow_download says so.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Importing torch, transformers and diffusers makes a million objects that stay, no garbage. At
# Python's own 700 its collector looks through them for a quarter of the time that they take.
_COLLECTED_AFTER = 10_000


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


def run_as_process(command_line: typer.Typer) -> None:
    """Run a command line as this process, which ends without taking its libraries apart.

    That would take a second of a command's time, for memory that goes back anyway. Threads are
    waited for and exit functions called as ever; an error's traceback ends the process as usual.
    """
    gc.set_threshold(_COLLECTED_AFTER)
    codes: list[int] = []
    atexit.register(_leave, codes)  # the first to be registered is the last to be called
    try:
        command_line()
    except SystemExit as ended:
        codes.append(ended.code if isinstance(ended.code, int) else bool(ended.code))
        raise


def _leave(codes: list[int]) -> None:
    """End the process now, if its code is known; whatever it has printed is written out."""
    if codes:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(codes[0])
