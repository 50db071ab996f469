"""Small stores for the cache tests, and roles that worker processes can import. Holds no test."""

import hashlib
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cache import ArraySpec, Codec, FillingParams, FillReport, Roles, StoreSpec, fill
from cluster import ScaleOutParams, crew_for

POSITIONS, CHANNELS = 5, 6
PROVENANCE = {"model": "hash", "weights": "0", "preprocessing": {"size": 8}}


def captions(count: int) -> list[str]:
    return [f"caption {i}" for i in range(count)]


def value(caption: str) -> np.ndarray:
    """What the encoder gives for a caption: float32 [5, 6]; position 0 is the same for all."""
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little")
    values = np.random.default_rng(seed).normal(size=(POSITIONS, CHANNELS)).astype(np.float32)
    values[0] = np.arange(CHANNELS)
    return values


def encode(payloads: Sequence[str]) -> dict[str, np.ndarray]:
    values = np.stack([value(payload) for payload in payloads])
    return {"embedding": values, "pooled": values[:, -1]}


def read(caption: str) -> str:
    if "unreadable" in caption:
        raise OSError(f"cannot open {caption}")
    return caption


def empty_prompt() -> dict[str, np.ndarray]:
    return {"empty_embedding": value("")}


def make_roles(seconds: float = 0.0, log: str | None = None) -> Roles:
    """Roles that take `seconds` a batch, and log what they encode to a file per process."""

    def encode_slowly(payloads: Sequence[str]) -> dict[str, np.ndarray]:
        time.sleep(seconds)
        if log:
            with (Path(log) / str(os.getpid())).open("a") as f:
                f.write("".join(f"{payload}\n" for payload in payloads))
        return encode(payloads)

    return Roles(read=read, encode=encode_slowly, constants=empty_prompt)


def make_spec(shard_rows: int = 8, **codec: object) -> StoreSpec:
    """Stores of `embedding` [N, 5, 6] in the codec given, and `pooled` [N, 6] in float32."""
    return StoreSpec(
        arrays={
            "embedding": ArraySpec(
                dims={"position": POSITIONS, "channel": CHANNELS},
                codec=Codec.model_validate(codec),
            ),
            "pooled": ArraySpec(dims={"channel": CHANNELS}, codec=Codec(dtype="float32")),
        },
        constants={"empty_embedding": {"position": POSITIONS, "channel": CHANNELS}},
        shard_rows=shard_rows,
    )


def fill_sample(
    path: str | Path,
    rows: Sequence[str],
    *,
    spec: StoreSpec | None = None,
    seconds: float = 0.0,
    log: str | Path | None = None,
    scheduler: str = "single",
    num_workers: int | None = None,
    **options: object,
) -> FillReport:
    params = FillingParams(batch_size=3)
    where = ScaleOutParams(scheduler=scheduler, num_workers=num_workers)
    options.setdefault("crew", crew_for(where, {}))
    options.setdefault("provenance", PROVENANCE)
    roles = partial(make_roles, seconds, None if log is None else str(log))
    return fill(path, rows, spec or make_spec(), roles, params=params, **options)  # type: ignore[arg-type]


def files(store: str | Path) -> dict[str, bytes]:
    """Every file of a store by its path in it."""
    root = Path(store)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
