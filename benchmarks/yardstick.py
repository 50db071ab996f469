"""What the device can do at best: matrix products and copies, to hold other numbers against.

    python -m benchmarks.yardstick [--device cuda] [--quick] [--json FILE]

On a GPU two bfloat16 matrices of 8192 x 8192, then the products of OPT-6.7B's layers over the
tokens of a batch of 200; on a CPU toy sizes in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.collect_env import get_nvidia_driver_version
from torch.utils.collect_env import run as run_command

from benchmarks.harness import Bench, Numbers, copy_rate, product_rate, repeated, run

PRODUCTS = {
    "attention": (4000, 4096, 4096),
    "feed-forward in": (4000, 4096, 16384),
    "feed-forward out": (4000, 16384, 4096),
    "output rows": (4000, 4096, 50266),
}


def measure(bench: Bench) -> None:
    bench.results["device"] = describe(bench)
    print(", ".join(f"{key} {value}" for key, value in bench.results["device"].items()))
    bench.part("large product", lambda: {"tflop_per_s": bench.matmul_rate / 1e12})
    for name, shape in PRODUCTS.items():
        m, k, n = shape if bench.on_gpu else (side // 50 for side in shape)
        rate = partial(product_rate, bench, m, k, n)
        bench.part(name, lambda: {"tflop_per_s": rate() / 1e12})  # noqa: B023
    bench.part("copy on the device", lambda: {"gb_per_s": copy_rate(bench) / 1e9})
    bench.part("copy to the device", partial(arriving, bench))


def describe(bench: Bench) -> dict[str, Any]:
    """What the device is."""
    if not bench.on_gpu:
        return {"name": "CPU"}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "driver": get_nvidia_driver_version(run_command),
        "cuda": torch.version.cuda,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "compute_capability": f"{found.major}.{found.minor}",
    }


def arriving(bench: Bench) -> Numbers:
    """From ordinary memory, and from page-locked."""
    values = torch.ones(bench.size(2**20, 2**20, 2**28), dtype=torch.uint8)
    found = {}
    for pinned in (False, True) if bench.on_gpu else (False,):
        source = values.pin_memory() if pinned else values
        copy = partial(source.to, bench.device, copy=True, non_blocking=True)
        found["pinned" if pinned else "pageable"] = values.nbytes / repeated(bench, copy) / 1e9
    return {f"{name}_gb_per_s": rate for name, rate in found.items()}


if __name__ == "__main__":
    run(measure, __doc__, wall=True)
