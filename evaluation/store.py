"""What evaluations have already made, so that a killed run goes on where it was.

    work/pictures/KEY/SET/00012-3f5e....png     KEY: one method with the models and code it runs
                      texts.jsonl               captions and answers

A picture is known by the hash of everything else that it depends on: its name ends in it. Every
evaluation with the same models shares them, whatever else it measures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from gill_files import written_whole
from pipeline.frozen.provenance import png_chunks

_TEXTS = "texts.jsonl"


class EvaluationStore:
    """The pictures and texts of each method.

    Args:
        folders: method to the folder of what its models made; `gill` also makes the texts.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)
        self._pictures = {
            f"{method} {path.stem.partition('-')[2]}": path
            for method, folder in self._folders.items()
            for path in sorted(folder.glob("*/*.png"))
        }
        self._texts = self._read_texts()

    def picture(self, method: str, key: str) -> Path | None:
        """The finished picture of this key, None where it is still to be made."""
        return self._pictures.get(f"{method} {key}")

    def save_picture(
        self, method: str, set_: str, index: int, key: str, picture: Image.Image
    ) -> Path:
        """Write a picture, whole or not at all."""
        path = self._folders[method] / set_ / f"{index:05d}-{key}.png"
        with written_whole(path) as part:
            picture.save(part, format="PNG", compress_level=1, pnginfo=png_chunks(picture))
        self._pictures[f"{method} {key}"] = path
        return path

    def text(self, key: str) -> str | None:
        """The finished text of this key, None where it is still to be made."""
        return self._texts.get(key)

    def save_texts(self, texts: Mapping[str, str]) -> None:
        """Append texts; a line that a killed run left half-written is ignored later."""
        self._texts |= texts
        file = self._folders["gill"] / _TEXTS
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": k, "text": t}, ensure_ascii=False) for k, t in texts.items()]
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n" + "\n".join(lines) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read_texts(self) -> dict[str, str]:
        path = self._folders["gill"] / _TEXTS
        if not path.is_file():
            return {}
        texts = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                texts[row["key"]] = row["text"]
            except (ValueError, TypeError, KeyError):
                continue
        return texts


def key_for(*parts: Any) -> str:
    """16 hex digits of a hash over JSON-able parts."""
    content = json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
