"""What the benchmarks share: options, timing in turn, peak memory, the table, the JSON at the end.

A benchmark is a function `measure(bench)` that `run` calls. It measures part by part. Each part is
at once a line of the table and an entry of the JSON, so one that fails loses no other.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

Numbers = Mapping[str, Any]
Call = Callable[[], object]

_OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# For torch's `sdpa_kernel`. cuDNN makes a plan for every new shape.
ATTENTION = {"cuDNN off": _OTHERS, "cuDNN on": [SDPBackend.CUDNN_ATTENTION, *_OTHERS]}


class Unavailable(Exception):  # noqa: N818
    """Something that this machine lacks and may lack: the part is skipped, which is no failure."""


class Bench:
    """One run of a benchmark: where it measures, at which sizes, and what it found so far.

    `given` are the options. `toy` are sizes of seconds and, on a CPU, also the parts meant for a
    GPU (`extra`). `wall`: on a CPU too the time is that on the wall, not the processor's, which a
    busy machine disturbs least but which counts every thread.
    """

    def __init__(self, given: argparse.Namespace, wall: bool = False) -> None:
        self.given, self.device = given, given.device
        self.quick, self.toy, self.on_gpu = given.quick, given.toy, given.device == "cuda"
        self.extra = self.toy or self.on_gpu
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.results: dict[str, Any] = {}
        self.failed: list[str] = []
        self._columns: tuple[str, ...] = ()
        self._part = ""
        self._clock = time.perf_counter if wall or self.on_gpu else time.process_time

    def size(self, toy: Any, cpu: Any, gpu: Any) -> Any:
        """That of the three which is measured here."""
        return toy if self.toy else gpu if self.on_gpu else cpu

    def part(self, name: str, work: Callable[[], Numbers], **headline: str) -> None:
        """Do one part; keep and print its numbers, or why there are none.

        `headline` copies numbers to the top of the JSON: their name here, their name there.
        """
        self._part = name
        try:
            outcome = dict(work())
            single = {key: value for key, value in outcome.items() if not isinstance(value, dict)}
            if wrong := [key for key, value in single.items() if not math.isfinite(value)]:
                raise ArithmeticError(f"not finite: {', '.join(wrong)}")
            self.results |= {there: outcome[here] for here, there in headline.items()}
        except Unavailable as error:
            outcome = {"skipped": str(error)}
        except Exception as error:
            traceback.print_exc()
            self.failed.append(name)
            outcome = {"failed": traceback.format_exception_only(error)[0].splitlines()[0]}
        self.results[name] = outcome
        self._print(name, outcome)
        self.write()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def write(self) -> str:
        """Bring the JSON file up to date; returns its line."""
        line = json.dumps(self.results)
        if self.given.json is not None:
            self.given.json.write_text(line + "\n", encoding="utf-8")
        return line

    def _print(self, name: str, outcome: Numbers) -> None:
        """A line of the table, under a new heading where the columns changed."""
        inner = [value for value in outcome.values() if isinstance(value, dict)]
        single = {key: value for key, value in outcome.items() if not isinstance(value, dict)}
        if tuple(single) != self._columns:
            self._columns = tuple(single)
            print(f"\n{'':40}" + "".join(f"  {key:>10}" for key in single))
        shown = [
            value if isinstance(value, str) else f"{value:>{max(10, len(key))}.4g}"
            for key, value in single.items()
        ]
        shares = [f"\n{share:8.1%}  {key}" for one in inner for key, share in one.items()]
        print("  ".join([f"{name:40}", *shown]) + "".join(shares), flush=True)

    def once(self, call: Call) -> float:
        """Seconds of one call and of the device's work for it."""
        wait = torch.cuda.synchronize if self.on_gpu else lambda: None
        wait()
        start = self._clock()
        call()
        wait()
        return self._clock() - start

    def seconds(self, call: Call, times: int = 5) -> float:
        """Median of several calls after a warm-up; with toy sizes of one call."""
        if not self.toy:
            call()
        return median(self.once(call) for _ in range(1 if self.toy else times))

    def in_turn(self, rounds: int, **ways: Call) -> dict[str, float]:
        """Two ways, one after the other in every round: what disturbs the machine disturbs both.

        Returns the median seconds of each (NAME_s), `speedup`, how many times faster the first way
        is, and `spread`, the distance of the rounds' extreme ratios over their median.
        """
        taken = [[self.once(call) for call in ways.values()] for _ in range(rounds)]
        medians = [median(side) for side in zip(*taken)]
        ratios = [second / first for first, second in taken]
        spread = (max(ratios) - min(ratios)) / median(ratios)
        named = {f"{name}_s": seconds for name, seconds in zip(ways, medians)}
        return named | {"speedup": medians[1] / medians[0], "spread": spread}

    def memory(self, call: Call) -> tuple[int, int]:
        """Bytes held before a call, and the most during it: of a GPU's tensors, of this process."""
        held = reset_peak(self.device)
        call()
        return held, peak(self.device)

    @cached_property
    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product, with random numbers: zeros draw less power."""
        return product_rate(self, *[self.size(256, 256, 8192)] * 3)

    def rate(self, flop: float, seconds: float) -> dict[str, float]:
        """TFLOP/s, and their share of the large matrix product's."""
        reached = flop / seconds
        return {"tflop_per_s": reached / 1e12, "of_matmul": reached / self.matmul_rate}

    def kernels(self, call: Call) -> dict[str, Any]:
        """Where a call's time goes.

        `busy` is the kernels' time over the call's when it is not profiled: far below 1, the device
        waits for Python. `launches` and `waits` count what Python asks of a GPU and how often it
        stands still for it. `longest`: kernels with their shares. The whole profile goes beside the
        JSON, for chrome://tracing or Perfetto: STEM.PART.trace.json.gz.
        """
        seconds = self.seconds(call)
        with torch.profiler.profile() as profile:
            self.once(call)
        if self.given.json is not None:
            part = re.sub(r"\W+", "-", self._part)
            profile.export_chrome_trace(str(self.given.json.with_suffix(f".{part}.trace.json.gz")))
        spent, counts = Counter[str](), Counter[str]()
        for event in profile.key_averages():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            counts["launches"] += event.count if "LaunchKernel" in event.key else 0
            counts["waits"] += event.count if "Synchronize" in event.key else 0
            if on_device == self.on_gpu:
                own = event.self_device_time_total if on_device else event.self_cpu_time_total
                spent[event.key[:100]] += own
        total = sum(spent.values())
        longest = {name: own / total for name, own in spent.most_common(12)}
        return {"busy": total * 1e-6 / seconds, **counts, "longest": longest}


def product_rate(bench: Bench, m: int, k: int, n: int) -> float:
    """FLOP/s of [m, k] times [k, n]."""
    a, b = (torch.randn(*s, device=bench.device).to(bench.dtype) for s in ((m, k), (k, n)))
    return 2 * m * k * n / repeated(bench, lambda: a @ b)


def copy_rate(bench: Bench) -> float:
    """Bytes/s read and written by a copy within the device's memory."""
    source = torch.ones(bench.size(2**22, 2**22, 2**30), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes / repeated(bench, lambda: target.copy_(source))


def repeated(bench: Bench, call: Call) -> float:
    """Seconds per call, several in a row: for what is shorter than waiting for the device."""
    return bench.seconds(lambda: [call() for _ in range(20)], times=1) / 20


def count_flop(call: Call) -> int:
    """Operations of a call, by torch's count, which does not know its own fused encoder layers."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def reset_peak(device: str) -> int:
    """Let the peak count from here; returns the bytes held now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> int:
    """The most bytes since `reset_peak`: tensors on a GPU, or what of this process was resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's: a process begins there with what its parent held.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call in a fresh process, whose memory is its own, and which gives back what it frees."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run(
    measure: Callable[[Bench], None], description: str, *, wall: bool = False, **options: type
) -> None:
    """Read the options, measure, and print the results as one line of JSON; exits with 1 where a
    part failed. `options` are further ones, by their types; a bool is a flag."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases, within 50 s on 2 cores")
    parser.add_argument("--toy", action="store_true", help="sizes of seconds: does all of it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line there")
    for name, kind in options.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=kind)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; --device cpu needs none")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(given, wall)
    gc.freeze()  # what was imported is no garbage: collecting between the parts stays cheap
    measure(bench)
    gc.unfreeze()
    print(bench.write())
    if bench.failed:
        raise SystemExit(f"failed: {', '.join(bench.failed)}")
