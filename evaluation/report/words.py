"""How methods, metrics, sets, tables and figures are called on the report: words.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

METHODS: dict[str, str] = _WORDS["methods"]
METRICS: dict[str, str] = _WORDS["metrics"]
TABLES: dict[str, dict[str, Any]] = _WORDS["tables"]
"""Title, note, and of an ablation its `variants` with their names."""
FIGURES: dict[str, dict[str, Any]] = _WORDS["figures"]
LOSSES: dict[str, str] = _WORDS["losses"]


def set_name(name: str) -> str:
    """`story_5_pictures` -> `story, 5 captions and 4 pictures`, where no title is at hand."""
    if name in _WORDS["sets"]:
        return _WORDS["sets"][name]
    kind, _, rest = name.partition("_")
    number = rest.partition("_")[0]
    if kind == "story" and number.isdigit():
        words = f"story, {number} caption{'s' * (number != '1')}"
        return f"{words} and {int(number) - 1} pictures" if name.endswith("pictures") else words
    if kind == "dialogue" and number.isdigit():
        return f"dialogue, {number} round{'s' * (number != '1')}"
    return name.replace("_", " ")
