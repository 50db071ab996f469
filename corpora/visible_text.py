"""Whether a person would see anything of a text."""

from __future__ import annotations

import re
import unicodedata

# C0, DEL and C1 controls, and the byte-order mark; str.split takes care of other white space.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ufeff]")

# Letters and marks of Unicode's Default_Ignorable_Code_Point, which Python does not have, and the
# empty Braille pattern. The rest of that property is of category Cf.
_BLANK = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
)
_INVISIBLE = frozenset(("Cc", "Cf", "Cn", "Cs", "Zl", "Zp", "Zs"))


def is_visible(text: str) -> bool:
    """False for a text of white space, control and format characters, and blank letters alone."""
    if text.isascii():
        return (text.strip() != "" and text.isprintable()) or any(map(_is_visible, text))
    return any(map(_is_visible, text))


def _is_visible(character: str) -> bool:
    return character not in _BLANK and unicodedata.category(character) not in _INVISIBLE
