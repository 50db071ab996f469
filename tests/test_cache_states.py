"""The tests of `cache_states.py`, in a process of their own: they fork, and what is forked from a
process with threads waits for the locks that those hold, for ever."""

import subprocess
import sys
from pathlib import Path

import pytest

STATES = Path(__file__).with_name("cache_states.py")


def run(*options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run([*command, str(STATES)], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
@pytest.mark.parametrize("which", ["nothing_is_lost", "not nothing_is_lost"])
def test_stores_lose_nothing_whatever_befalls_them(which: str) -> None:
    # Apart: what the others do in their own process starts zarrs' threads.
    run("-k", which)


@pytest.mark.torture
def test_stores_lose_nothing_in_many_steps() -> None:
    run("-m", "torture")
