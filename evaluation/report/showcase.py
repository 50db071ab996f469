"""The README's pictures from the run that lies here: `python -m evaluation.report.showcase docs`.

`examples.png` has the first held-out examples of each kind, `chat.gif` the first conversations of
the report, a message at a time. Nothing is computed: both show what the stage evaluate wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from corpora.pictures import open_picture
from evaluation.report.grids import Grid, Talk, grids, talks, told
from evaluation.report.words import METHODS
from evaluation.results import Record, read_records
from gill.artifacts import ARTIFACTS

_INK, _SOFT, _PAPER = "#1d2330", "#5b6577", "#ffffff"
_SAID, _ANSWERED = "#e6effc", "#eef0f4"
_SIDE = 128  # pixels of a picture that is an answer
_ROWS = 2  # examples of each kind
_KINDS = ("story_5_pictures", "dialogue_10", "captions")
_MESSAGE, _ANSWER = 1100, 3000  # milliseconds


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _picture(reference: str, side: int) -> Image.Image:
    """At most `side` pixels wide and high; small ones enlarged with hard edges."""
    picture = open_picture(reference)
    factor = side // max(picture.size)
    if factor > 1:
        width, height = picture.size
        return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((side, side))
    return picture


def _wrapped(text: str, size: int, width: int) -> str:
    """The text with line breaks, no line wider than `width` pixels."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and _font(size).getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def _text(text: str, size: int, width: int, ink: str = _INK, ground: str = _PAPER) -> Image.Image:
    wrapped = _wrapped(text, size, width)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    box = probe.multiline_textbbox((0, 0), wrapped or " ", font=_font(size), spacing=5)
    image = Image.new("RGB", (int(box[2]) + 1, int(box[3]) + 3), ground)
    ImageDraw.Draw(image).multiline_text((0, 0), wrapped, ink, font=_font(size), spacing=5)
    return image


def _stacked(parts: Sequence[Image.Image], gap: int, ground: str = _PAPER) -> Image.Image:
    height = sum(part.height for part in parts) + gap * (len(parts) - 1)
    image = Image.new("RGB", (max(part.width for part in parts), height), ground)
    y = 0
    for part in parts:
        image.paste(part, (0, y))
        y += part.height + gap
    return image


def _beside(parts: Sequence[Image.Image], gap: int, ground: str = _PAPER) -> Image.Image:
    width = sum(part.width for part in parts) + gap * (len(parts) - 1)
    image = Image.new("RGB", (width, max(part.height for part in parts)), ground)
    x = 0
    for part in parts:
        image.paste(part, (x, 0))
        x += part.width + gap
    return image


# --- examples.png


def draw_examples(blocks: Sequence[Grid]) -> Image.Image:
    """The first examples of each block: what was told, the real picture, what each method made."""
    rows = []
    for block in blocks:
        rows.append(_text(block.title, 22, 900))
        rows += [_example(record, block.methods) for record in block.records[:_ROWS]]
    page = _stacked(rows, 18)
    framed = Image.new("RGB", (page.width + 40, page.height + 40), _PAPER)
    framed.paste(page, (20, 20))
    return framed


def _example(record: Record, methods: Sequence[str]) -> Image.Image:
    shown = [
        _stacked([_picture(picture, 64), _text(text, 12, 92)], 4)
        for text, picture in told(record)
        if picture is not None
    ]
    words = "\n".join(text for text, picture in told(record) if picture is None)
    parts = ([_beside(shown, 12)] if shown else []) + [_text(words, 15, 400)]
    left = Image.new("RGB", (430, _SIDE + 22), _PAPER)
    context = _stacked(parts, 8)
    if context.height > left.height:
        left = left.resize((left.width, context.height))
    left.paste(context, (0, 0))
    made = ({"real": record.real} if record.real else {}) | {
        METHODS.get(method, method): record.pictures[method]
        for method in methods
        if method in record.pictures
    }
    return _beside(
        [
            left,
            *(
                _stacked([_picture(picture, _SIDE), _text(name, 14, _SIDE, _SOFT)], 4)
                for name, picture in made.items()
            ),
        ],
        16,
    )


# --- chat.gif


def draw_chat(
    talks: Sequence[Talk], width: int = 420, height: int = 560
) -> list[tuple[Image.Image, int]]:
    """A frame per message, the last messages in sight, and how long it stands in milliseconds."""
    frames: list[tuple[Image.Image, int]] = []
    for talk in talks:
        bubbles: list[tuple[Image.Image, int]] = []
        for one in talk.exchanges:
            bubbles += [
                (_bubble([*_words(text, _SAID), *_shown(picture)], _SAID), width - 16)
                for text, picture in one.told
            ]
            answer = _words(one.words, _ANSWERED)
            if one.pictures:
                answer.append(_beside([_picture(p, _SIDE) for _, p in one.pictures], 10, _ANSWERED))
            bubbles.append((_bubble(answer, _ANSWERED), 0))
        for count in range(1, len(bubbles) + 1):
            time = _MESSAGE if bubbles[count - 1][1] else _ANSWER
            frames.append((_window(bubbles[:count], width, height), time))
    return frames


def _words(text: str, ground: str) -> list[Image.Image]:
    return [_text(text, 16, 280, ground=ground)] if text else []


def _shown(picture: str | None) -> list[Image.Image]:
    return [] if picture is None else [_picture(picture, 64 * 2)]


def _bubble(parts: Sequence[Image.Image], ground: str) -> Image.Image:
    inside = _stacked(parts, 8, ground)
    bubble = Image.new("RGB", (inside.width + 24, inside.height + 20), _PAPER)
    ImageDraw.Draw(bubble).rounded_rectangle(
        (0, 0, bubble.width - 1, bubble.height - 1), 14, fill=ground
    )
    bubble.paste(inside, (12, 10))
    return bubble


def _window(bubbles: Sequence[tuple[Image.Image, int]], width: int, height: int) -> Image.Image:
    """The end of a conversation; a bubble with a right edge stands there, others on the left."""
    whole = Image.new("RGB", (width, 16 + sum(b.height + 10 for b, _ in bubbles)), _PAPER)
    y = 16
    for bubble, right in bubbles:
        whole.paste(bubble, (right - bubble.width if right else 16, y))
        y += bubble.height + 10
    window = Image.new("RGB", (width, height), _PAPER)
    window.paste(whole, (0, min(0, height - whole.height)))
    return window


def main() -> None:
    """Draw both pictures into the folder that the command line names."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    records = read_records(ARTIFACTS.evaluation / "records.parquet")
    kinds = [block for block in grids(records, _ROWS) if block.records[0].set in _KINDS]
    draw_examples(kinds).save(folder / "examples.png", optimize=True)
    pictures, times = zip(*draw_chat(talks(records)))
    kept = [picture.quantize(128, dither=Image.Dither.NONE) for picture in pictures]
    kept[0].save(
        folder / "chat.gif", save_all=True, append_images=kept[1:], duration=list(times), loop=0
    )
    print(f"{folder / 'examples.png'} and {folder / 'chat.gif'}")


if __name__ == "__main__":
    main()
