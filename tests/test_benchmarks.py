"""Every benchmark at toy sizes on the CPU, the parts that are meant for a GPU included, so that all
of it is known to work before it meets one; and what they share."""

import argparse
import gzip
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import all as runner
from benchmarks import train_step
from benchmarks.harness import Bench, Unavailable, count_flop

ROOT = Path(__file__).parents[1]
# The numbers that are read elsewhere, at the top of the JSON.
KEYS = {
    "yardstick": ["device"],
    "train_step": [
        *("speedup", "memory_ratio", "documents_cost", "flop_per_example"),
        *("turns_bfloat16", "turns_grids"),
    ],
    "decoding": ["speedup_32", "speedup_128", "speedup_512", "of_generate_32"],
    "cache": ["vs_mmap", "vs_fancy_indexing", "vs_npy_per_row", "bytes_ratio", "relative_error"],
    "precompute": ["features_vs_bare", "targets_vs_bare"],
    "index": ["rows"],
    "captions": ["rows"],
    "conversation": [
        *("first_piece_passes", "retrieval_ms_100k", "turn_20_over_turn_2", "batch_8_speedup"),
    ],
    "memory": ["worst"],
    "loading": ["fed_vs_memory"],
    "generation": [],
    "attention": [],
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """A benchmark's results at toy sizes, in this process."""

    def run(name, *options):
        file = tmp_path / f"{name}.json"
        arguments = ["--device", "cpu", "--toy", *options, "--json", str(file)]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        results = json.loads(file.read_text())
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
        for key in () if options else KEYS[name]:
            assert key in results
        return results

    return run


def parts(results):
    return {name: part for name, part in results.items() if isinstance(part, dict)}


@pytest.mark.parametrize(
    "name",
    ["yardstick", "attention", "cache", "captions", "loading", "precompute", "generation"],
)
def test_every_part_gives_positive_numbers(run, name):
    results = run(name)
    assert parts(results)
    for part, numbers in parts(results).items():
        for key, value in numbers.items():
            if key not in ("name", "longest", "launches", "waits", "spread"):
                assert value > 0, (part, key)


def test_peers_of_the_cache_are_read_or_named_as_not_installed(run):
    results = parts(run("cache", "--peers"))
    assert {"litdata", "webdataset", "disk, in sequence, cold"} <= set(results)
    for part, numbers in results.items():
        if "skipped" in numbers:
            assert "is not installed" in numbers["skipped"], part
        else:
            assert numbers["ours_vs_this"] > 0, part


def test_the_training_step_agrees_with_the_plain_one_and_rates_with_times(run, tmp_path):
    results = run("train_step")
    assert results["gradients"]["relative_error"] < 1e-5
    assert results["gradients"]["of_worst_tensor"] < 1e-4
    assert results["speedup"] == results["4 examples"]["speedup"]
    # Pairs that share sequences attend to each other.
    assert results["flop_per_example_packed"] > results["flop_per_example"] > 0
    steps = [numbers for numbers in parts(results).values() if "tflop_per_s" in numbers]
    assert len(steps) == 9
    for numbers in steps:
        assert numbers["tflop_per_s"] == pytest.approx(numbers["tflop"] / numbers["step_s"])
        assert numbers["run_h"] == pytest.approx(numbers["step_s"] * 20_000 / 3600)
    whole = results["toy, 6"]
    assert whole["tflop"] == pytest.approx(6 * results["flop_per_example"] / 1e12)
    shares = list(results["toy, kernels"]["longest"].values())
    assert sum(shares) <= 1 + 1e-9
    assert shares == sorted(shares, reverse=True)
    with gzip.open(tmp_path / "train_step.toy-kernels.trace.json.gz") as trace:
        assert any(
            "aten::addmm" in event.get("name", "") for event in json.load(trace)["traceEvents"]
        )


def test_both_ways_of_decoding_say_the_same(run):
    results = run("decoding")
    for length in (32, 128, 512):
        numbers = results[f"prompt of {length}"]
        assert numbers["same_tokens"] == 1
        assert numbers["distinct"] > 1
        assert results[f"speedup_{length}"] == numbers["speedup"]


def test_every_kind_of_index_has_its_recall_and_speed(run):
    results = run("index")
    for kind in ("flat", "hnsw", "ivf-sq8", "ivf-pq"):
        assert results[kind]["recall_at_10"] > 0.9
        assert results[kind]["speedup"] > 0
    assert results["flat"]["recall_at_10"] == 1
    assert results["product on the device, float32"]["recall_at_10"] == 1


def test_a_conversation_finds_the_nearest_pictures(run):
    results = run("conversation")
    assert results["retrieval"]["recall_at_1"] > 0.9
    assert results["batch_8_pictures_speedup"] > 0


def test_memory_is_predicted_beside_what_is_measured(run):
    results = run("memory")
    for name in ("train 4", "features 2", "generation 1"):
        numbers = results[name]
        assert numbers["ratio"] == pytest.approx(numbers["predicted_mb"] / numbers["measured_mb"])


# --- what they share -----------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    file = tmp_path / "results.json"
    return Bench(argparse.Namespace(device="cpu", quick=False, toy=False, json=file))


def test_operations_of_the_denoising_loss_stand_at_the_top(bench, monkeypatch):
    """At full size, as no weights are needed; the toy run leaves them out."""
    monkeypatch.delitem(train_step.GENERATORS, "SDXL")
    train_step.at_generators(bench)
    assert bench.failed == []
    part = bench.results["operations, denoising, SD 1.5"]
    assert bench.results["denoising_flop"] == part["flop"] > 1e12
    assert part["recomputed_mib"] < part["mib"]


def test_a_part_that_fails_is_recorded_and_the_next_one_is_done(bench, capsys):
    def lacks():
        raise Unavailable("no such card")

    bench.part("bad", lambda: {"s": 1 / 0})
    bench.part("not a number", lambda: {"s": math.nan})
    bench.part("absent", lacks)
    bench.part("good", lambda: {"s": 2.0}, s="headline")
    expected = {
        "bad": {"failed": "ZeroDivisionError: division by zero"},
        "not a number": {"failed": "ArithmeticError: not finite: s"},
        "absent": {"skipped": "no such card"},
        "good": {"s": 2.0},
        "headline": 2.0,
    }
    assert bench.results == expected
    assert json.loads(bench.given.json.read_text()) == expected
    assert bench.failed == ["bad", "not a number"]
    assert "good" in capsys.readouterr().out


def test_two_ways_are_timed_in_turn(bench):
    now, order = [0.0], []

    def taking(name, seconds):
        def call():
            now[0] += seconds.pop(0)
            order.append(name)

        return call

    bench._clock = lambda: now[0]
    fast, slow = taking("fast", [1.0, 2.0, 4.0]), taking("slow", [3.0, 4.0, 20.0])
    numbers = bench.in_turn(3, fast=fast, slow=slow)
    assert order == ["fast", "slow"] * 3
    # Ratios 3, 2, 5.
    assert numbers == {"fast_s": 2.0, "slow_s": 4.0, "speedup": 2.0, "spread": 1.0}


def test_memory_is_what_a_call_takes_at_most(bench):
    def call():
        for _ in range(3):
            torch.ones(2**26, dtype=torch.uint8)

    held, most = bench.memory(call)
    # The system counts pages that were resident before: a few less may be new.
    assert 0.9 * 2**26 <= most - held < 1.5 * 2**26


def test_operations_of_fused_layers_are_counted():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    with torch.no_grad():
        counted = count_flop(lambda: layer(torch.randn(3, 5, 16)))
    products = 4 * 16 * 16 + 2 * 16 * 64
    assert counted == 3 * 2 * (5 * products + 2 * 5 * 5 * 16)


def test_without_a_gpu_it_says_so_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.yardstick", "--device", "cuda"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr == "--device cuda: torch finds no GPU here; --device cpu needs none\n"


def test_what_one_benchmark_found_is_kept_where_another_fails(monkeypatch, tmp_path):
    file = tmp_path / "all.json"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["all", "--json", str(file)])
    monkeypatch.setattr(runner, "LIMITS", {"no_such_benchmark": 60.0, "yardstick": 60.0})
    with pytest.raises(SystemExit, match="not done: no_such_benchmark"):
        runner.main()
    found = json.loads(file.read_text())["benchmarks"]
    assert found["no_such_benchmark"]["status"] == "failed"
    assert found["yardstick"]["status"] == "done"
    assert found["yardstick"]["results"]["large product"]["tflop_per_s"] > 0


def test_all_are_run_within_eight_minutes_and_what_one_leaves_the_next_have(monkeypatch):
    assert set(runner.LIMITS) == set(KEYS)
    assert sum(runner.LIMITS.values()) <= 480
    now, given = [100.0], []

    def taking(name, options, limit, traces):
        given.append(limit)
        now[0] += limit if name == "slow" else 1.0
        return {"status": "done", "seconds": 1.0, "results": {}}

    monkeypatch.setattr(sys, "argv", ["all", "--device", "cuda"])
    monkeypatch.setattr(runner, "LIMITS", {"fast": 10.0, "slow": 5.0, "last": 7.0})
    monkeypatch.setattr(runner, "run", taking)
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    runner.main()
    assert given == [10, 14, 7]


def test_a_benchmark_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert runner.run("yardstick", [], 0.01)["status"] == "ended after 0 s"
