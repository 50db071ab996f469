"""Pictures in the terminal, where it can show them: kitty's, iTerm2's and sixel graphics.

What a terminal can do is read from the environment; it is never asked, because an answer could get
lost among what a person types. Where nothing is known, pictures are shown as their paths.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Literal

import numpy as np
from PIL import Image

Graphics = Literal["kitty", "iterm2", "sixel"]

_SMALLEST, _LARGEST = 192, 512
_KITTY_CHUNK = 4096


def detect_graphics(environment: Mapping[str, str]) -> Graphics | None:
    """What the terminal of this environment can show, or None."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return None  # passes none of them on, unless told to
    if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    if "sixel" in term or term in ("foot", "foot-extra", "mlterm", "yaft-256color"):
        return "sixel"
    return None


def picture_escape(picture: Image.Image, graphics: Graphics) -> str:
    """The characters that make the terminal draw the picture, at a size that a person can see."""
    shown = picture.convert("RGB")
    largest = max(shown.size)
    if not _SMALLEST <= largest <= _LARGEST:
        factor = min(max(largest, _SMALLEST), _LARGEST) / largest
        size = (max(1, round(shown.width * factor)), max(1, round(shown.height * factor)))
        shown = shown.resize(size, Image.Resampling.LANCZOS)
    if graphics == "sixel":
        return _sixel(shown)
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    if graphics == "iterm2":
        return f"\x1b]1337;File=inline=1;size={len(buffer.getvalue())}:{data}\x07"
    chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    escapes = []
    for number, chunk in enumerate(chunks):
        head = "a=T,f=100," if number == 0 else ""
        escapes.append(f"\x1b_G{head}m={int(number < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(escapes)


def _sixel(picture: Image.Image) -> str:
    """DEC sixel: bands of six rows, one pass per colour that occurs in the band."""
    indexed = picture.quantize(64)
    palette = np.array(indexed.getpalette()).reshape(-1, 3)
    pixels = np.array(indexed)
    pixels = np.pad(pixels, ((0, -len(pixels) % 6), (0, 0)), mode="edge")
    used = np.unique(pixels)
    colours = (palette[used] * 100 + 127) // 255
    parts = [f'\x1bP0;1q"1;1;{picture.width};{picture.height}']
    parts += [f"#{index};2;{r};{g};{b}" for index, (r, g, b) in zip(used, colours)]
    weights = 1 << np.arange(6)
    for top in range(0, len(pixels), 6):
        band = pixels[top : top + 6]
        rows = []
        for index in np.unique(band):
            codes = 63 + (weights[:, None] * (band == index)).sum(0)
            rows.append(f"#{index}" + "".join(map(chr, codes.tolist())))
        parts.append("$".join(rows) + "-")
    return "".join(parts) + "\x1b\\"
