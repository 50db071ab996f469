"""Training from the cache under torchrun: any number of processes sees the same rows and losses."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_training import SETTINGS, SIZES, tiny_gill
from tiny_language_models import NUM_WORDS

from cache import ArraySpec, ReadingParams, Roles, StoreSpec, fill
from pipeline.bridge.checkpoint import STATE, load_state
from pipeline.settings import Objective
from pipeline.training.distribution import num_processes, processes, rank
from pipeline.training.loop import train
from stages.cached_batches import BatchMaker, CachedBatches

ROOT = Path(__file__).parents[1]
ROWS = 42  # an epoch: 5 batches of 8, and 2 rows that it leaves out
EIGHT = SETTINGS.model_copy(update={"batch_size": 8, "checkpoint_every": 1, "validate_every": 99})
STORES = {
    "features": ("pooled", {"visual": SIZES["d"]}),
    "targets": ("embedding", {"l": SIZES["L"], "c": SIZES["D"]}),
}


class Captions:
    """A caption table of one to five words that depend on the row."""

    def captions(self, rows: np.ndarray) -> list[str]:
        return [" ".join(f"w{(row * 7 + i) % (NUM_WORDS - 10)}" for i in range(row % 5 + 1))
                for row in rows.tolist()]  # fmt: skip


@dataclass
class Logged:
    """Batches that write down which rows they had; the process kills itself after `last`."""

    batches: CachedBatches
    rows: list[list[int]]
    last: int | None

    def __iter__(self):
        for batch in self.batches:
            if self.last is not None and len(self.rows) == self.last and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            self.rows.append(batch.rows.tolist())
            yield batch

    def state_dict(self) -> dict:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.batches.load_state_dict(state)


def make_stores(folder: Path) -> None:
    for store, (name, dims) in STORES.items():

        def encode(rows, name=name, dims=dims):
            draws = [np.random.default_rng(row).normal(size=[*dims.values()]) for row in rows]
            return {name: np.stack(draws).astype(np.float16)}

        fill(
            folder / f"{store}.zarr",
            list(range(ROWS)),
            StoreSpec(arrays={name: ArraySpec(dims=dims)}, shard_rows=8),
            lambda encode=encode: Roles(read=int, encode=encode),
            provenance={"model": "numbers"},
        )


def train_here(stores: Path, name: str, last: int | None = None, resume: bool = False) -> None:
    """One run, or one process of it; leaves its rows (per process) and its curve (of the first)."""
    gill = tiny_gill()
    artifacts = SimpleNamespace(features=stores / "features.zarr", targets=stores / "targets.zarr")
    batches = CachedBatches(
        BatchMaker(Captions(), gill.language_model, 5, artifacts=artifacts),  # type: ignore[arg-type]
        np.arange(ROWS),
        batch_size=8,
        seed=3,
        rank=rank(),
        world_size=num_processes(),
        reading=ReadingParams(block_rows=3, buffer_rows=12),
    )
    logged = Logged(batches, [], last)
    folder = stores / name
    result = train(gill, logged, Objective.released(), EIGHT, directory=folder, resume=resume)
    (folder / f"rows{rank()}.json").write_text(json.dumps(logged.rows))
    if rank() == 0:
        (folder / "curve.json").write_text(json.dumps(result.curve))


def torchrun(count: int, stores: Path, name: str, last: str = "") -> int:
    """The exit status."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
         "--standalone", "--max-restarts", "0", __file__, str(stores), name, last],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
        capture_output=True,
    ).returncode  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in json.loads((folder / "curve.json").read_text())]


def steps(folder: Path, count: int) -> list[list[int]]:
    """The rows of every global step."""
    parts = [json.loads((folder / f"rows{i}.json").read_text()) for i in range(count)]
    return [list(chain.from_iterable(step)) for step in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of one process in it."""
    folder = tmp_path_factory.mktemp("stores")
    make_stores(folder)
    train_here(folder, "one")
    return folder


def test_four_processes_take_the_rows_and_have_the_losses_of_one(stores: Path) -> None:
    assert torchrun(4, stores, "four") == 0
    assert steps(stores / "four", 4) == steps(stores / "one", 1)
    assert losses(stores / "four") == pytest.approx(losses(stores / "one"), rel=1e-6)


def test_a_run_killed_on_two_processes_goes_on_with_one(stores: Path) -> None:
    """In the middle of an epoch: no row comes twice, none is lost, and no loss is another."""
    assert torchrun(2, stores, "killed", "3") != 0
    state = load_state(stores / "killed" / STATE)
    begun = state.record.step
    assert begun in (2, 3)
    assert state.data == {"epoch": 0, "step": begun, "batch_size": 8}
    train_here(stores, "killed", resume=True)
    assert steps(stores / "killed", 1) == steps(stores / "one", 1)[begun:]
    assert losses(stores / "killed") == pytest.approx(losses(stores / "one"), rel=1e-6)


if __name__ == "__main__":
    with processes():
        train_here(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if sys.argv[3] else None)
