"""Shared fixtures, and the import hook that checks every tensor shape in `pipeline` at run time."""

import os

# One thread per process: small models are slower with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("pipeline", "beartype.beartype")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the shared test data; tests that need it skip, saying so, without it."""
    folder = Path(os.environ.get("GILL_SHARED_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"shared test data not found at {folder}: set GILL_SHARED_DATA")
    return folder.resolve()
