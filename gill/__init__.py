"""A trained GILL to talk to: `from gill import Gill`, `Gill.load("artifacts")`.

>>> gill = Gill.load("artifacts")
>>> gill.reply(["a red ring."])
[Text("..."), RetrievedImage(...)]
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gill_errors import GillError

if TYPE_CHECKING:
    from gill.loading import Gill

__all__ = ["Gill", "GillError"]

_ROOMS = ("cache", "cluster", "corpora", "miniature", "pipeline", "settings", "workfolder")


def _refuse_shadows() -> None:
    """Another package of a room's name, such as a folder beside the user's script, hides ours."""
    home = Path(__file__).resolve().parents[1]
    for room in _ROOMS:
        spec = importlib.util.find_spec(room)
        places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        if not any(place and Path(place).resolve().parent == home for place in places):
            where = places[0] if places else "nowhere"
            raise ImportError(
                f"`import {room}` finds {where}, not GILL's own package in {home}: rename that "
                "folder, or start Python from another one"
            )


_refuse_shadows()


def __getattr__(name: str) -> Any:
    if name == "Gill":  # not before it is asked for: it takes seconds to import
        from gill.loading import Gill

        return Gill
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
