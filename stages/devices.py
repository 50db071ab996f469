"""Which device and number of threads a stage computes with, and how much its libraries say."""

from __future__ import annotations

import torch

from stages.params import RunParams


def set_up(run: RunParams) -> torch.device:
    """Set torch's threads; `auto` is the first GPU where there is one, else the CPU."""
    torch.set_num_threads(run.threads)
    quieten_libraries()
    if run.device != "auto":
        return torch.device(run.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quieten_libraries() -> None:
    """No bars for loading small files and no warning per cut prompt; errors still show."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    of_diffusers.set_verbosity_error()
    of_diffusers.disable_progress_bar()
