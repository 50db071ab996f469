"""benchmarks.gpu at toy sizes on the CPU: every section gives its numbers, and what cannot run says
why, so that all of it is known to work before it meets a GPU."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# What a machine may lack, each with the part that says so.
OPTIONAL = {
    "faiss on the GPU": "no GPU search here",
    "nf4, batch 6 packed": "bitsandbytes is not installed",
    "nf4, batch 6 packed, 2 at once, recomputed": "bitsandbytes is not installed",
}


def run(*arguments, prelude=""):
    """The script in a process of its own; its last line, parsed."""
    code = f"{prelude}\nfrom benchmarks.gpu import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    file = tmp_path_factory.mktemp("gpu") / "result.json"
    arguments = ("--toy", "--device", "cpu", "--budget", "900", "--json", str(file))
    result, printed = run(*arguments)
    return result, printed, json.loads(file.read_text())


def test_every_section_gives_its_numbers(whole):
    from benchmarks.gpu import SECTIONS

    result, _, _ = whole
    assert list(result["sections"]) == [section.name for section in SECTIONS]
    for name, section in result["sections"].items():
        assert section["status"] == "done", (name, section)
        assert section["parts"], name
        for part, numbers in section["parts"].items():
            if part in OPTIONAL and "skipped" in numbers:
                assert OPTIONAL[part] in numbers["skipped"]
                continue
            assert numbers, (name, part)
            for key, value in numbers.items():
                assert isinstance(value, float), (name, part, key, value)
                assert math.isfinite(value), (name, part, key, value)
                assert value > 0, (name, part, key, value)


def test_the_result_says_what_was_measured_on_what(whole):
    result, printed, written = whole
    assert result == written
    assert result["toy"] is True
    assert result["device"]["name"] == "CPU"
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result["date"].endswith("+00:00")
    assert "== training OPT-6.7B" in printed


def test_the_numbers_hang_together(whole):
    result, _, _ = whole
    rate = result["sections"]["yardstick"]["parts"]["matrix product"]["flop_per_s"]
    for name in ("training OPT-1.3B", "quantised training OPT-6.7B"):
        for part in result["sections"][name]["parts"].values():
            if "tflop_per_example" in part:
                reached = part["tflop_per_example"] * part["examples_per_s"]
                assert part["tflop_per_s"] == pytest.approx(reached)
                assert part["of_matmul"] == pytest.approx(part["tflop_per_s"] * 1e12 / rate)
    search = result["sections"]["search"]["parts"]
    assert search["torch, float32"]["recall_at_10"] == 1
    assert search["faiss on the CPU"]["recall_at_10"] > 0.99
    for section in ("training OPT-1.3B", "features", "targets", "generation"):
        [kernels] = [
            numbers
            for part, numbers in result["sections"][section]["parts"].items()
            if part.startswith("kernels")
        ]
        shares = [value for key, value in kernels.items() if key != "busy"]
        assert sum(shares) <= 1 + 1e-9
        assert shares == sorted(shares, reverse=True)


BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def test_missing_packages_skip_their_sections_by_name():
    blocked = {"diffusers", "open_clip", "zarr", "faiss", "bitsandbytes"}
    names = ("yardstick", "features", "targets", "feeding", "search", "generation")
    result, _ = run(
        *("--toy", "--device", "cpu", "--budget", "900", "--only", *names),
        prelude=BLOCK.format(blocked=blocked),
    )
    sections = result["sections"]
    why = {name: section.get("why") for name, section in sections.items()}
    assert why == {
        "yardstick": None,
        "features": "open_clip is not installed",
        "targets": "diffusers is not installed",
        "feeding": "zarr is not installed",
        "search": None,
        "generation": "diffusers is not installed",
    }
    assert sections["search"]["parts"]["faiss on the CPU"] == {"skipped": "faiss is not installed"}
    assert sections["search"]["parts"]["torch, float32"]["queries_per_s"] > 0


def test_flop_of_the_visual_encoder_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.gpu_features import operations, vit
    from benchmarks.gpu_measure import Machine

    encoder, config = vit(Machine("cpu", toy=True))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            encoder.pooled(torch.randn(1, 3, *encoder.image_size))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert operations(config) == pytest.approx(counter.get_total_flops(), rel=0.01)


# --- isolation -----------------------------------------------------------------------------------


def breaks(machine, report):
    report.measure("good", lambda: {"seconds": 1.0})
    report.measure("bad", lambda: {"seconds": 1 / 0})
    report.measure("not a number", lambda: {"seconds": math.nan})


def fails(machine, report):
    report.measure("good", lambda: {"seconds": 1.0})
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


def dies(machine, report):
    report.measure("good", lambda: {"seconds": 1.0})
    os._exit(11)


def hangs(machine, report):
    report.measure("good", lambda: {"seconds": 1.0})
    time.sleep(600)


def section_of(function, seconds=60.0, budget=900.0):
    import multiprocessing

    from benchmarks.gpu import Section, _run
    from benchmarks.gpu_measure import Machine

    section = Section(function.__name__, "here", seconds)
    context = multiprocessing.get_context("fork")
    machine = Machine("cpu", toy=True)
    return _run(context, section, function, machine, time.monotonic() + budget)


def test_a_part_that_fails_is_recorded_and_the_next_one_is_done():
    found = section_of(breaks)
    assert found["status"] == "incomplete"
    assert found["parts"]["good"] == {"seconds": 1.0}
    assert found["parts"]["bad"]["failed"].startswith("ZeroDivisionError: division by zero (tests/")
    assert found["parts"]["not a number"] == {"failed": "not finite: ['seconds']"}


@pytest.mark.parametrize(
    ("function", "seconds", "why"),
    [
        (fails, 60.0, "RuntimeError: CUDA error: an illegal memory access was encountered"),
        (dies, 60.0, "its process died"),
        (hangs, 2.5, "it took too long and was ended"),
    ],
)
def test_what_ends_a_section_is_recorded_with_the_numbers_it_had(function, seconds, why):
    found = section_of(function, seconds)
    assert found["status"] == "incomplete"
    assert found["why"].startswith(why)
    assert found["parts"] == {"good": {"seconds": 1.0}}


def test_a_section_for_which_no_time_is_left_is_skipped():
    found = section_of(breaks, seconds=60.0, budget=30.0)
    assert found["status"] == "skipped"
    assert found["why"].startswith("it needs up to 60 s and ")
    assert found["parts"] == {}


def test_without_a_gpu_it_says_how_to_try_without_one():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--only", "yardstick"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "no usable cuda" in done.stderr
    assert "--toy --device cpu" in done.stderr
