"""Interleaved documents: text and pictures in reading order, in the forms in which they come.

    own        [{"text": "..."}, {"image": "a.png", "caption": "..."}, ...]   a line each
    OBELICS    {"images": [null, "a.png"], "texts": ["...", null]}            a line each
    mmc4       {"text_list": [...], "image_info": [{"image_name": "a.png",
                "matched_text_index": 0}, ...]}                               a line each
    VIST       story-in-sequence JSON: each sentence, then its picture
    VisDial    1.0 JSON: the dialogue, then its picture

A picture belongs to its own caption where there is one, else to the text just before it, else to
the text just after it. What belongs to a picture is what the generator is to be told of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora.caption_params import CheckLevel
from corpora.json_files import read_json, text, whole_number
from corpora.prompts import dialogue_prompt
from corpora.records import CorpusError, Exclusion
from corpora.visdial import read_dialogues
from corpora.vist import read_stories


@dataclass(frozen=True)
class Picture:
    """A picture in its place, and the text that belongs to it."""

    image: str
    caption: str


@dataclass(frozen=True)
class InterleavedDocument:
    """Texts and pictures in reading order; `row` is where in the file, counted from 1, or an id."""

    file: str
    row: str
    parts: tuple[str | Picture, ...]


def read_documents(
    path: str, images_dir: str | None = None, check: CheckLevel = "header", max_chars: int = 2000
) -> Iterator[InterleavedDocument | Exclusion]:
    """The documents of a file in its order, and those that cannot be used with the reason.

    Pictures are relative to `images_dir`, by default the file's folder; those of VIST and VisDial
    are found there by their ids and checked, others are as written. Of a text that belongs to a
    picture the first `max_chars` characters are taken.

    Raises:
        CorpusError: no such file, or none of these forms.
    """
    folder = images_dir or str(Path(path).parent)
    if path.lower().endswith((".jsonl", ".ndjson")):
        yield from _lines(path, max_chars)
        return
    content = read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        stories, report = read_stories(path, folder, check)
        yield from report.excluded
        for story in stories:
            told: list[_Part] = []
            for one in story.pictures:
                told += [one.caption, (_absolute(one.image), one.caption)]
            yield _document(path, story.id, told, max_chars)
    elif isinstance(content, dict) and "version" in content:
        dialogues, report = read_dialogues(path, None, folder, check)
        yield from report.excluded
        for dialogue in dialogues:
            words = dialogue_prompt(dialogue.questions_and_answers)
            parts: list[_Part] = [words, (_absolute(dialogue.image), dialogue.caption)]
            yield _document(path, dialogue.id, parts, max_chars, keep_lines=True)
    else:
        raise CorpusError(
            f"{path}: neither VIST nor VisDial 1.0; documents of other forms are JSONL, one a line"
        )


_Part = str | tuple[Any, Any]
"""Text, or a picture's name and caption, as written."""


def _absolute(image: str | None) -> str:
    assert image is not None, "read with their pictures"
    return os.path.abspath(image)


def _lines(path: str, max_chars: int) -> Iterator[InterleavedDocument | Exclusion]:
    if not os.path.isfile(path):
        raise CorpusError(f"{path}: no such file")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for row, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                line.encode()
                parts = _parts(json.loads(line))
            except UnicodeEncodeError:
                yield Exclusion(path, str(row), "bad encoding")
            except (json.JSONDecodeError, RecursionError) as error:
                yield Exclusion(path, str(row), "not JSON", str(error))
            except ValueError as error:
                yield Exclusion(path, str(row), "malformed", str(error))
            else:
                yield _document(path, str(row), parts, max_chars)


def _parts(record: Any) -> list[_Part]:
    """Raises ValueError: none of the forms."""
    if isinstance(record, list):
        return [_own_part(part) for part in record]
    if not isinstance(record, dict):
        raise ValueError("neither a list of parts nor a record")
    if "text_list" in record:
        return _of_mmc4(record)
    if "images" in record and "texts" in record:
        images, texts = record["images"], record["texts"]
        if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
            raise ValueError("images and texts are not lists of one length")
        pairs = zip(images, texts)
        return [
            (image, None) if words is None else words for image, words in pairs if image or words
        ]
    raise ValueError("no text_list, and no images beside texts")


def _own_part(part: Any) -> _Part:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, dict) and isinstance(part.get("image"), str):
        return part["image"], part.get("caption")
    raise ValueError('a part is neither {"text": ...} nor {"image": ...}')


def _of_mmc4(record: dict[str, Any]) -> list[_Part]:
    """Sentences, each with the pictures that are matched with it behind it."""
    texts, infos = record["text_list"], record.get("image_info")
    if not isinstance(texts, list) or not isinstance(infos, list):
        raise ValueError("text_list and image_info are not lists")
    behind: dict[int, list[Any]] = {}
    for info in infos:
        place = whole_number(info.get("matched_text_index")) if isinstance(info, dict) else None
        if place is None or not 0 <= place < len(texts):
            raise ValueError("a picture's matched_text_index names no text")
        behind.setdefault(place, []).append(info.get("image_name") or info.get("raw_url"))
    parts: list[_Part] = []
    for place, words in enumerate(texts):
        parts += [words, *((image, words) for image in behind.get(place, []))]
    return parts


def _document(
    file: str, row: str, written: list[_Part], max_chars: int, keep_lines: bool = False
) -> InterleavedDocument | Exclusion:
    """Empty texts left out, neighbouring ones joined, and each picture with what belongs to it."""
    parts: list[str | tuple[Any, Any]] = []
    for part in written:
        if isinstance(part, tuple):
            if not isinstance(part[0], str) or not part[0].strip():
                return Exclusion(file, row, "malformed", "a picture without a name")
            parts.append(part)
            continue
        if not isinstance(part, str):
            return Exclusion(file, row, "malformed", "a text that is none")
        words = part.strip() if keep_lines else text(part)
        if words and parts and isinstance(parts[-1], str):
            parts[-1] = f"{parts[-1]} {words}"
        elif words:
            parts.append(words)
    texts = [place for place, part in enumerate(parts) if isinstance(part, str)]
    if not parts:
        return Exclusion(file, row, "empty document")
    if len(texts) == len(parts):
        return Exclusion(file, row, "document without pictures")
    captioned = all(text(part[1]) for part in parts if isinstance(part, tuple))
    if not texts and not captioned:
        return Exclusion(file, row, "document without text")

    def belonging(place: int) -> str:
        own = text(parts[place][1])
        if own is None:
            before = [other for other in texts if other < place]
            nearest = parts[before[-1]] if before else parts[texts[0]]
            own = " ".join(str(nearest).split())
        return own if len(own) <= max_chars else own[:max_chars].rsplit(" ", 1)[0]

    return InterleavedDocument(
        file,
        row,
        tuple(
            part if isinstance(part, str) else Picture(part[0].strip(), belonging(place))
            for place, part in enumerate(parts)
        ),
    )
