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
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
