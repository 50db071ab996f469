"""The device and its two rates: a large matrix product and a large copy."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import torch

from benchmarks.gpu_measure import Machine, Numbers, Report

TIMES = 20


def describe_device(machine: Machine) -> dict[str, Any]:
    """Name, driver, memory and CUDA version of the device.

    Raises what torch raises where there is none.
    """
    if not machine.is_gpu:
        return {"name": "CPU"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def yardstick(machine: Machine, report: Report) -> None:
    """Both rates, each over several calls in a row."""
    report.measure("matrix product", lambda: matrix_product(machine))
    report.measure("copy", lambda: copy(machine))


def matrix_product(machine: Machine) -> Numbers:
    """Two bfloat16 matrices of 8192 x 8192, random: zeros draw less power and run faster."""
    n = 128 if machine.toy else 8192
    a, b = (torch.randn(n, n, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _each(machine, lambda: a @ b)
    return {"n": n, "seconds": seconds, "flop_per_s": 2 * n**3 / seconds}


def copy(machine: Machine) -> Numbers:
    """4 GiB within the device's memory, bytes read and written counted."""
    size = 2**20 if machine.toy else 2**32
    source = torch.ones(size, device=machine.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = _each(machine, lambda: target.copy_(source))
    return {"bytes": size, "seconds": seconds, "bytes_per_s": 2 * size / seconds}


def _each(machine: Machine, call: Any) -> float:
    for _ in range(3):
        call()
    machine.wait()
    start = time.perf_counter()
    for _ in range(TIMES):
        call()
    machine.wait()
    return (time.perf_counter() - start) / TIMES


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi did not answer"
    return found.stdout.split("\n")[0].strip()
