"""How a console script ends: what it has printed and begun is complete, its exit code its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BODY = """
import atexit, gc, sys, threading, time
from stages.command_line import CommandLine, run_as_process
from gill_errors import GillError

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
app = CommandLine(help="Commands.")

@app.command()
def work():
    atexit.register(print, "exit function")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("worked", gc.get_threshold()[0] > 700, gc.isenabled())
    {end}

@app.command()
def other(): ...

run_as_process(app)
"""
# Buffered, as a console script's output to a file or a pipe is.
ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
COMPLETE = "worked True True\nthread\nexit function\n"


def ran(end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BODY.format(end=end), "work"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('why')", 1, "why\n"),
        ("raise GillError('what to do')", 1, "error: what to do\n"),
    ],
)
def test_a_command_ends_with_its_code_and_leaves_nothing_unfinished(end, code, told):
    result = ran(end)
    assert (result.returncode, result.stderr) == (code, told)
    assert result.stdout == COMPLETE  # and nothing was taken apart


def test_a_fault_of_ours_has_its_traceback():
    result = ran("{}['a key']")
    assert result.returncode == 1
    assert "KeyError" in result.stderr
    assert result.stdout == COMPLETE + "taken apart\n"


def test_a_reader_that_went_away_is_no_fault():
    with subprocess.Popen(
        [sys.executable, "-c", BODY.format(end="pass"), "work"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()  # what was printed is written at the end, to nobody
        assert process.stderr.read() == ""
