"""Command sample: pictures for the prompts of a benchmark, where its own scorer looks for them.

Made in blocks, whole files: a run that is killed goes on with the pictures that are not there yet.
sampling.json says what made them, and that no prompt was rewritten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from corpora.benchmark_prompts import (
    Benchmark,
    BenchmarkPrompt,
    picture_name,
    read_benchmark_prompts,
)
from gill.artifacts import ARTIFACTS
from gill.loading import Gill, heads_of
from gill_errors import InputError, StageError
from gill_files import remove_partial_files, written_whole
from gill_progress import Ticker
from pipeline.bridge.checkpoint import fingerprint_heads
from pipeline.devices import set_up
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.provenance import png_chunks
from pipeline.talking.reading import read_contexts
from settings.params import Params
from stages.picture_grid import picture_grid

SAMPLING = "sampling.json"
_PROMPTS_AT_ONCE = 8
_SEEDS_APART = 1000
"""Sample s of prompt i has seed + 1000 i + s, whatever else is made."""


def run(params: Params, prompts: Path, folder: Path, samples: int, seed: int) -> None:
    """Write the pictures and sampling.json to `folder`.

    Raises StageError where pictures of another model, seed or file lie there, and CorpusError for
    prompts that cannot be read.
    """
    benchmark, rows = read_benchmark_prompts(prompts)
    if benchmark == "dpg" and samples != 4:
        raise InputError(f"--samples is {samples}: DPG-Bench reads a 2x2 grid of 4")
    if samples > _SEEDS_APART:
        raise InputError(f"--samples is {samples}: at most {_SEEDS_APART}")
    device = set_up(params.run.device, params.run.threads)
    gill = Gill.load(
        ARTIFACTS.root,
        device=str(device),
        checkpoint=params.training.checkpoint,
        with_decision=False,
    )
    _describe(folder, _sampling(gill, params, benchmark, rows, samples, seed))
    remove_partial_files(folder)
    waiting = [
        (number, row)
        for number, row in enumerate(rows)
        if not all((folder / picture_name(benchmark, row, s)).is_file() for s in range(samples))
    ]
    done = len(rows) - len(waiting)
    with Ticker("pictures", unit="prompts") as ticker:
        for start in range(0, len(waiting), _PROMPTS_AT_ONCE):
            block = waiting[start : start + _PROMPTS_AT_ONCE]
            made = _pictures(gill, params, block, samples, seed)
            for (_, row), pictures in zip(block, made, strict=True):
                _write(folder, benchmark, row, pictures)
            ticker.count(done + start + len(block), len(rows))
    print(f"{folder}: {samples} pictures for each of {len(rows)} prompts, {done} were there before")


def _pictures(
    gill: Gill,
    params: Params,
    block: Sequence[tuple[int, BenchmarkPrompt]],
    samples: int,
    seed: int,
) -> list[list[Image.Image]]:
    """Per prompt of the block its samples."""
    assert gill.generator is not None
    hidden = read_contexts(gill.model, gill.encoder, [[row.prompt] for _, row in block])
    told = gill.model.conditioning(hidden)
    pooled = None if told.pooled is None else told.pooled.repeat_interleave(samples, dim=0)
    pictures = gill.generator.generate(
        Conditioning(told.embedding.repeat_interleave(samples, dim=0), pooled),
        gill.empty_prompt,
        seeds=[seed + _SEEDS_APART * number + s for number, _ in block for s in range(samples)],
        settings=params.generation_settings,
    )
    return [pictures[i : i + samples] for i in range(0, len(pictures), samples)]


def _write(
    folder: Path, benchmark: Benchmark, row: BenchmarkPrompt, pictures: list[Image.Image]
) -> None:
    if row.metadata is not None:
        with written_whole(folder / row.name / "metadata.jsonl") as part:
            part.write_text(row.metadata, encoding="utf-8")
    chunks = [png_chunks(picture) for picture in pictures]
    if benchmark == "dpg":  # the seed is that of the first
        pictures = [picture_grid(pictures, columns=2)]
    for sample, picture in enumerate(pictures):
        with written_whole(folder / picture_name(benchmark, row, sample)) as part:
            picture.save(part, "PNG", pnginfo=chunks[sample])


def _sampling(
    gill: Gill,
    params: Params,
    benchmark: Benchmark,
    rows: Sequence[BenchmarkPrompt],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    assert gill.backbones is not None
    told = json.dumps([[row.name, row.prompt] for row in rows]).encode()
    return {
        "benchmark": benchmark,
        "prompts": len(rows),
        "prompts_sha256": hashlib.sha256(told).hexdigest(),
        "prompts_rewritten": False,
        "samples": samples,
        "seed": seed,
        "seeds": f"seed + {_SEEDS_APART} * prompt + sample",
        "generation": params.generation.model_dump(mode="json"),
        "heads": fingerprint_heads(heads_of(ARTIFACTS, params.training.checkpoint)),
        "frozen": {
            role: {"source": model.public_source, "fingerprint": model.fingerprint}
            for role, model in gill.backbones
        },
    }


def _describe(folder: Path, sampling: dict[str, Any]) -> None:
    """Write sampling.json, or see that what lies there says the same. Raises StageError."""
    path = folder / SAMPLING
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise StageError(f"{path} is not JSON: name another folder with --out") from None
        other = [name for name in sampling if there.get(name) != sampling[name]]
        if other:
            raise StageError(
                f"{folder} holds pictures made otherwise ({', '.join(other)}): name another folder "
                "with --out"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise StageError(f"{folder} is not empty and holds no {SAMPLING}: name another with --out")
    with written_whole(path) as part:
        part.write_text(json.dumps(sampling, indent=1) + "\n", encoding="utf-8")
