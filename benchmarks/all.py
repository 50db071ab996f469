"""Every benchmark in a process of its own, what matters most on a GPU first.

    python -m benchmarks.all [--device cuda] [--quick] [--json FILE]

On a GPU each is ended when its seconds, and what those before it left of theirs, are over: all
after eight minutes. What was found until then is kept, as is what others found where one fails; the
JSON file is written anew after every one, and profiles of kernels lie beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import distributions
from math import inf
from pathlib import Path
from typing import Any

LIMITS = {
    "yardstick": 20.0,
    "train_step": 140.0,
    "loading": 40.0,
    "precompute": 60.0,
    "decoding": 45.0,
    "generation": 50.0,
    "memory": 35.0,
    "attention": 25.0,
    "cache": 20.0,
    "index": 20.0,
    "conversation": 15.0,
    "captions": 10.0,
}
"""In seconds, on a GPU: eight minutes in all. What one leaves the next ones have."""
PACKAGES = "torch triton transformers diffusers open_clip_torch zarr zarrs faiss-cpu bitsandbytes"


def main() -> None:
    """Run them; exits with 1 where one was not done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    limited = given.device == "cuda"
    end = time.monotonic()
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.getoutput("git describe --always --dirty --abbrev=12"),
        "device": given.device,
        "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES.split()},
        "benchmarks": {},
    }
    for name, limit in LIMITS.items():
        print(f"== {name}", flush=True)
        options = ["--device", given.device, *["--quick"] * given.quick]
        end += limit
        traces = given.json and given.json.parent
        outcome = run(name, options, end - time.monotonic() if limited else inf, traces)
        print(f"== {name}: {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
        found["benchmarks"][name] = outcome
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    if undone := [n for n, outcome in found["benchmarks"].items() if outcome["status"] != "done"]:
        raise SystemExit(f"not done: {', '.join(undone)}")


def run(name: str, options: list[str], limit: float, traces: Path | None = None) -> dict[str, Any]:
    """One benchmark, ended after `limit` seconds with all processes that it started: its status
    (`done`, `failed`, `ended after N s`), seconds, and results, of the parts until its end. Its
    profiles go to the folder `traces`."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.json")
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json", str(file)]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status = "failed" if process.wait(None if limit == inf else max(limit, 0)) else "done"
        except subprocess.TimeoutExpired:
            status = f"ended after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if traces is not None:
            for trace in Path(folder).glob("*.trace.json.gz"):
                shutil.move(trace, traces / trace.name)
    return {"status": status, "seconds": time.monotonic() - start, "results": results}


if __name__ == "__main__":
    main()
