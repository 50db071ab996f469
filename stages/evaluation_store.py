"""What the evaluation has already made, so that a killed run goes on where it was.

    artifacts/evaluation/state.json             fingerprints of what made the pictures and texts
                         pictures/METHOD/SET/00012-3f5e....png
                         texts.jsonl            captions and answers

A picture is known by the hash of everything that it depends on: its name ends in it. The models are
in the state instead: with other heads, what the old ones made is cleared, and a sentence says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

_STATE, _PICTURES, _TEXTS = "state.json", "pictures", "texts.jsonl"


class EvaluationStore:
    """The pictures and texts below one folder.

    Args:
        folder: artifacts/evaluation.
        makers: method to the fingerprint of the models that it runs; `gill` also makes the texts.
            What another fingerprint made is removed.
    """

    def __init__(self, folder: Path, makers: Mapping[str, str]) -> None:
        self._folder = folder
        self._clear_outdated(makers)
        self._pictures = {
            _key_of(path): path for path in sorted((folder / _PICTURES).glob("*/*/*.png"))
        }
        self._texts = self._read_texts()

    def picture(self, method: str, key: str) -> Path | None:
        """The finished picture of this key, None where it is still to be made."""
        return self._pictures.get(f"{method} {key}")

    def save_picture(
        self, method: str, set_: str, index: int, key: str, picture: Image.Image
    ) -> Path:
        """Write a picture, whole or not at all."""
        path = self._folder / _PICTURES / method / set_ / f"{index:05d}-{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        picture.save(part, format="PNG", compress_level=1)
        os.replace(part, path)
        self._pictures[f"{method} {key}"] = path
        return path

    def text(self, key: str) -> str | None:
        """The finished text of this key, None where it is still to be made."""
        return self._texts.get(key)

    def save_texts(self, texts: Mapping[str, str]) -> None:
        """Append texts; a line that a killed run left half-written is ignored later."""
        self._texts |= texts
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": k, "text": t}, ensure_ascii=False) for k, t in texts.items()]
        with (self._folder / _TEXTS).open("a", encoding="utf-8") as stream:
            stream.write("\n" + "\n".join(lines) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _clear_outdated(self, makers: Mapping[str, str]) -> None:
        old = self._read_state()
        for method, fingerprint in makers.items():
            if old.get(method) in (None, fingerprint):
                continue
            shutil.rmtree(self._folder / _PICTURES / method, ignore_errors=True)
            if method == "gill":
                (self._folder / _TEXTS).unlink(missing_ok=True)
            print(f"{self._folder}: other models made what was there of {method}; it is removed")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / _STATE
        part = path.with_suffix(".part")
        part.write_text(json.dumps(old | dict(makers), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)

    def _read_state(self) -> dict[str, str]:
        """Pictures without a readable state are of unknown origin, and not used."""
        try:
            state = json.loads((self._folder / _STATE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            shutil.rmtree(self._folder / _PICTURES, ignore_errors=True)
            (self._folder / _TEXTS).unlink(missing_ok=True)
            return {}
        return state if isinstance(state, dict) else {}

    def _read_texts(self) -> dict[str, str]:
        path = self._folder / _TEXTS
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


def fingerprint_of(parts: Sequence[str]) -> str:
    """One fingerprint of several."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _key_of(path: Path) -> str:
    return f"{path.parent.parent.name} {path.stem.partition('-')[2]}"
