"""Which device and number of threads a stage computes with."""

from __future__ import annotations

import torch

from stages.params import RunParams


def set_up(run: RunParams) -> torch.device:
    """Set torch's threads; `auto` is the first GPU where there is one, else the CPU."""
    torch.set_num_threads(run.threads)
    if run.device != "auto":
        return torch.device(run.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
