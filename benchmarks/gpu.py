"""Every GPU measurement of the project in one go, under 8 minutes on one H200.

    python -m benchmarks.gpu [--json FILE] [--budget SECONDS] [--only SECTION ...]
    python -m benchmarks.gpu --toy --device cpu      the same code at the sizes of seconds

Works from a bare copy of the tree, with nothing installed from it, and with random weights that
are made on the device: nothing is downloaded. A section whose packages are missing is skipped and
names them; benchmarks/results/README.md lists what a machine needs.

Every section is a process of its own: what fails, runs out of memory or breaks the device's context
is recorded under its name, and the next one begins with a clean device. A section that needs more
seconds than are left is skipped; one that takes twice what it should is ended. The JSON is written
anew after every section. Its shape:

    {"device": {...}, "versions": {...}, "date", "commit", "toy", "budget_s", "seconds",
     "sections": {SECTION: {"status": done | incomplete | failed | skipped, "why", "seconds",
                            "parts": {PART: {NUMBER: float} | {"failed": why} | {"skipped": why}}}}}
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Lets libraries ask for a GPU without touching it, so that processes can still be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

from benchmarks.gpu_measure import Machine, Report, missing, told
from benchmarks.gpu_yardstick import describe_device

BUDGET = 440.0
PACKAGES = (
    *("torch", "triton", "torchvision", "transformers", "tokenizers", "diffusers", "numpy"),
    *("open_clip_torch", "pydantic", "zarr", "numcodecs", "zarrs"),
    *("faiss-cpu", "faiss-gpu-cu12", "bitsandbytes"),
)


@dataclass(frozen=True)
class Section:
    """A function `(machine, report)` and the seconds it takes on an H200 at most."""

    name: str
    function: str
    """`module:function` of this room; the module is imported only if the section is run."""
    seconds: float


# What matters most comes first; compiling, which is slow and least certain, last.
SECTIONS = (
    Section("yardstick", "gpu_yardstick:yardstick", 15),
    Section("training OPT-1.3B", "gpu_training:opt_1_3b", 50),
    Section("training OPT-6.7B", "gpu_training:opt_6_7b", 75),
    Section("quantised training OPT-6.7B", "gpu_training:quantised_6_7b", 50),
    Section("features", "gpu_features:features", 45),
    Section("targets", "gpu_generator:targets", 20),
    Section("feeding", "gpu_feeding:feeding", 30),
    Section("decoding", "gpu_decoding:decoding", 40),
    Section("search", "gpu_search:search", 45),
    Section("memory", "gpu_memory:memory", 40),
    Section("generation", "gpu_generator:generation", 45),
    Section("compiled generation", "gpu_generator:generation_compiled", 60),
    Section("compiled features", "gpu_features:features_compiled", 40),
)
Results = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line per part, and end with one JSON line."""
    given = _parse(arguments)
    begin = time.monotonic()
    deadline = begin + given.budget
    machine = Machine(given.device, given.toy)
    results: Results = {
        "device": {},
        "versions": _versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "toy": given.toy,
        "budget_s": given.budget,
        "sections": {},
    }
    sections = [s for s in SECTIONS if not given.only or s.name in given.only]
    functions = {section.name: _load(section) for section in sections}
    gc.freeze()  # what was imported is never garbage: collecting between parts stays cheap
    results["device"], processes = _find_device(machine)
    print(", ".join(f"{key} {value}" for key, value in results["device"].items()))
    for section in sections:
        print(f"== {section.name}", flush=True)
        function = functions[section.name]
        if isinstance(function, str):
            found = _skipped(function)
        else:
            found = _run(processes, section, function, machine, deadline)
        if "why" in found:
            print(f"   {found['status']}: {found['why']}", flush=True)
        results["sections"][section.name] = found
        if section.name == "yardstick":
            machine = _with_rates(machine, found["parts"])
        results["seconds"] = round(time.monotonic() - begin, 1)
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument(
        "--only", nargs="+", choices=names, help="these sections", metavar="SECTION"
    )
    parser.add_argument("--toy", action="store_true", help="the sizes of seconds, on any device")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.toy:
        parser.error("on a CPU only the toy sizes end in reasonable time: add --toy")
    return given


def _load(section: Section) -> Callable[[Machine, Report], None] | str:
    """The section's function, or why there is none here."""
    module, function = section.function.split(":")
    try:
        return getattr(importlib.import_module(f"benchmarks.{module}"), function)
    except ModuleNotFoundError as error:
        return missing(error)
    except Exception as error:  # a package that is there and does not work with the others
        return f"cannot be imported: {told(error)}"


def _find_device(machine: Machine) -> tuple[dict[str, Any], Any]:
    """What the device is, and a way to start processes that can use it: forked ones start fast."""
    reasons = []
    for method in ("fork", "spawn"):
        processes: Any = multiprocessing.get_context(method)
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=_describe, args=(sender, machine))
        process.start()
        sender.close()
        try:
            found: Any = receiver.recv() if receiver.poll(120) else "no answer within 120 s"
        except EOFError:
            found = "its process died"
        process.kill()
        process.join()
        if isinstance(found, dict):
            return {**found, "processes": method}, processes
        reasons.append(f"{method}: {found}")
    raise SystemExit(
        f"no usable {machine.device} ({'; '.join(reasons)}). "
        "To try everything without one: python -m benchmarks.gpu --toy --device cpu"
    )


def _describe(sender: Connection, machine: Machine) -> None:
    try:
        sender.send(describe_device(machine))
    except Exception as error:
        sender.send(told(error))


def _run(
    processes: Any,
    section: Section,
    function: Callable[[Machine, Report], None],
    machine: Machine,
    deadline: float,
) -> Results:
    """One section in a process of its own."""
    begin = time.monotonic()
    left = deadline - begin
    if left < section.seconds:
        return _skipped(f"it needs up to {section.seconds:.0f} s and {max(left, 0):.0f} s are left")
    limit = begin + min(left, 2 * section.seconds)
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_work, args=(sender, function, machine))
    process.start()
    sender.close()
    parts: dict[str, dict[str, Any]] = {}
    why = _listen(receiver, parts, limit)
    if why is None:
        process.join(10)
    process.kill()
    process.join()
    bad = [name for name, part in parts.items() if "failed" in part]
    if why is None and bad:
        why = f"{len(bad)} of {len(parts)} parts failed: {', '.join(bad)}"
    status = "done" if why is None else "incomplete" if len(bad) < len(parts) else "failed"
    result = {"status": status, "seconds": round(time.monotonic() - begin, 1), "parts": parts}
    return result if why is None else {**result, "why": why}


def _skipped(why: str) -> Results:
    return {"status": "skipped", "why": why, "seconds": 0.0, "parts": {}}


def _listen(receiver: Connection, parts: dict[str, dict[str, Any]], limit: float) -> str | None:
    """Collect a section's parts until it ends; returns what went wrong with it."""
    while True:
        if not receiver.poll(max(0.0, limit - time.monotonic())):
            return "it took too long and was ended"
        try:
            name, outcome = receiver.recv()
        except EOFError:
            return "its process died"
        if name is None:
            return outcome
        parts[name] = outcome
        shown = ", ".join(f"{k} {_short(v)}" for k, v in outcome.items())
        print(f"   {name}: {shown}", flush=True)


def _work(
    sender: Connection, function: Callable[[Machine, Report], None], machine: Machine
) -> None:
    """Inside the process: run the section, send (part, outcome), and (None, error) at the end."""
    if not machine.is_gpu:
        torch.set_num_threads(1)  # for such small models two are slower
    report = Report(send=lambda part, outcome: sender.send((part, outcome)))
    why = None
    try:
        function(machine, report)
    except Exception as error:
        why = told(error)
    sender.send((None, why))


def _with_rates(machine: Machine, parts: dict[str, dict[str, Any]]) -> Machine:
    return replace(
        machine,
        matmul_rate=parts.get("matrix product", {}).get("flop_per_s"),
        copy_rate=parts.get("copy", {}).get("bytes_per_s"),
    )


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """Of the code that ran; None in a copy without its history."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    root = Path(__file__).parents[1]
    try:
        found = subprocess.run(asked, cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
