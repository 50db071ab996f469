"""Which device and number of threads a stage computes with, and how much its libraries say."""

from __future__ import annotations

import torch

from pipeline.devices import pick_device
from stages.params import RunParams


def set_up(run: RunParams) -> torch.device:
    """Set torch's threads and quieten the libraries; gives the device to compute on."""
    torch.set_num_threads(run.threads)
    quieten_libraries()
    return pick_device(run.device)


def quieten_libraries() -> None:
    """No bars for loading small files and no warning per cut prompt; errors still show."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    of_diffusers.set_verbosity_error()
    of_diffusers.disable_progress_bar()
