"""Which device is computed on."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU; anything else as torch spells it.

    Raises RuntimeError for a name that torch does not know.
    """
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
