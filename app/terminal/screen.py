"""The terminal of a person: pictures where it can show any, and a word when something takes long.

Pictures are kitty's graphics, sixels or coloured half blocks (textual-image), whichever the
terminal says it can show. It is asked once, by `open_screen`: best before anything is typed, since
its answer comes the way that a person's letters come.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image
from rich.console import Console

_COLUMNS = 48
"""Widest picture."""
_ROWS_BESIDE = 4
"""Rows of the terminal that no picture takes."""


@dataclass(frozen=True)
class Screen:
    """Where pictures are drawn: with `renderable`, or nowhere, for the reason `blank`."""

    console: Console
    renderable: Any = None
    blank: str = ""

    def show(self, picture: Image.Image) -> None:
        """Draw the picture as large as it fits; nothing where none can be shown."""
        if self.renderable is None:
            return
        width, height = self.console.size
        ratio = picture.width / picture.height
        columns = min(_COLUMNS, width - 1, int(2 * ratio * (height - _ROWS_BESIDE)))
        shown = self.renderable(picture.convert("RGB"), width=max(columns, 1), height="auto")
        self.console.print(shown)


def open_screen() -> Screen:
    """Find out what the terminal can show; where there is no terminal at all `blank` is empty."""
    console = Console()
    if not sys.stdout.isatty():
        return Screen(console)
    if not sys.stdin.isatty():
        return Screen(console, blank="the input is no terminal, so it cannot say what it shows")
    if console.color_system is None:
        return Screen(console, blank=f"TERM={os.environ.get('TERM', '')} shows no colours")
    from textual_image import renderable  # asks the terminal

    if renderable.Image is renderable.TGPImage:
        console = Console(color_system="truecolor")  # pictures are numbered by colours
    return Screen(console, renderable.Image)


@contextmanager
def told_if_long(what: str, seconds: float = 2.0) -> Iterator[None]:
    """Say what is being done, once it has taken this long."""
    terminal, said = sys.stderr.isatty(), threading.Event()

    def say() -> None:
        print(f"{what} ...", end="" if terminal else "\n", file=sys.stderr, flush=True)
        said.set()

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if terminal and said.is_set():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
