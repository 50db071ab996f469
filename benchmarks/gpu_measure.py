"""What the GPU measurements share: the machine, timing, peak memory, a profile, and the report.

A section is a function `(machine, report) -> None` that calls `report.measure` once per part. A
part that fails or runs out of memory is recorded under its name, and the next one is tried.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Numbers = Mapping[str, float]
NUM_KERNELS = 12


@dataclass(frozen=True)
class Machine:
    """Where to measure, and the two rates that everything is compared with."""

    device: str
    """`cuda` or `cpu`."""
    toy: bool
    """Sizes of seconds on a CPU instead of the published ones."""
    matmul_rate: float | None = None
    """FLOP/s of a large bfloat16 matrix product; None where it could not be measured."""
    copy_rate: float | None = None
    """Bytes/s read and written by a copy within the device's memory."""

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def compiler(self) -> str:
        """torch.compile's backend; on a toy machine the model is traced and then run as it is."""
        return "eager" if self.toy else "inductor"

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], *, warmups: int = 2, times: int = 5) -> float:
        """Median wall-clock seconds of a call and of the device's work; on a toy machine once."""
        if self.toy:
            warmups, times = 0, 1
        for _ in range(warmups):
            call()
        taken = []
        for _ in range(times):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def peak_gib(self, call: Callable[[], object]) -> float:
        """Most device memory in tensors during a call, in GiB; on a CPU the process's own peak."""
        if not self.is_gpu:
            call()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**30

    def rate(self, operations: float, seconds: float) -> dict[str, float]:
        """TFLOP/s, and their share of the matrix product's where that is known."""
        reached = operations / seconds
        known = {} if self.matmul_rate is None else {"of_matmul": reached / self.matmul_rate}
        return {"tflop_per_s": reached / 1e12, **known}

    def kernels(self, call: Callable[[], object], seconds: float) -> dict[str, float]:
        """Where the device's time goes: shares of the longest kernels, and `busy`.

        `busy` is the kernels' time over `seconds`, what the call takes unprofiled: far below 1,
        the device waits for Python.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.is_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        call()
        self.wait()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            self.wait()
        spent: dict[str, float] = {}
        for event in profile.key_averages():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            if on_device == self.is_gpu:
                own = event.self_device_time_total if on_device else event.self_cpu_time_total
                spent[event.key[:100]] = spent.get(event.key[:100], 0.0) + own * 1e-6
        total = sum(spent.values())
        if not total:
            raise RuntimeError("the profiler saw no kernel")
        longest = sorted(spent.items(), key=lambda item: -item[1])[:NUM_KERNELS]
        return {"busy": total / seconds} | {name: own / total for name, own in longest if own}


@contextmanager
def made_in(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Modules that are built inside have their weights on `device`, in `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


class Unavailable(Exception):  # noqa: N818
    """Something that this machine does not have, and need not have: the part is skipped."""


@dataclass
class Report:
    """What one section found: part -> numbers, or -> why there are none."""

    send: Callable[[str, dict[str, Any]], None]
    """Told (part, outcome) as each part ends."""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def measure(self, part: str, work: Callable[[], Numbers]) -> None:
        """Do one part; keep its numbers, or why there are none."""
        try:
            numbers = {name: float(value) for name, value in work().items()}
            wrong = sorted(name for name, value in numbers.items() if not math.isfinite(value))
            self._keep(part, {"failed": f"not finite: {wrong}"} if wrong else numbers)
        except Unavailable as error:
            self.skip(part, str(error))
        except ModuleNotFoundError as error:
            self.skip(part, missing(error))
        except Exception as error:
            self._keep(part, {"failed": told(error)})
        finally:
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def skip(self, part: str, why: str) -> None:
        """Record that a part was not tried."""
        self._keep(part, {"skipped": why})

    def _keep(self, part: str, outcome: dict[str, Any]) -> None:
        self.parts[part] = outcome
        self.send(part, outcome)


OURS = ("pipeline", "cache", "corpora", "benchmarks", "tests")


def missing(error: ModuleNotFoundError) -> str:
    """Which package is not installed; raises the error again where the module is our own."""
    name = (error.name or "").split(".")[0]
    if not name or name in OURS:
        raise error
    return f"{name} is not installed"


def told(error: BaseException) -> str:
    """An error in one line, with the place in this project that it came from."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if any(f"/{room}/" in name for room in OURS) and "site-packages" not in name:
            place = f" ({'/'.join(name.split('/')[-2:])}:{trace.tb_lineno})"
        trace = trace.tb_next
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}{place}"


def transformer_operations(layers: int, width: int, tokens: int) -> float:
    """FLOP of one forward pass of a transformer over one sequence: 4-fold feed-forward, full
    attention, without embeddings and head."""
    return layers * (24 * width**2 * tokens + 4 * tokens**2 * width)
