"""Precomputing into the cache beside a bare loop that runs the same model on data in memory.

Random models of real sizes: CLIP ViT-B/32 on JPEG files of 256 x 256 pixels, and the text encoder
of Stable Diffusion 1.x (12 layers, width 768, 77 positions). One thread for the model; the cache's
own readers and writers run beside it.

    python -m benchmarks.precompute [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from cache import ArraySpec, Codec, FillingParams, Roles, StoreSpec, fill
from corpora.pictures import open_picture
from pipeline.visual_encoder import VisualEncoder

LENGTH, WIDTH, VOCABULARY = 77, 768, 49408


def main() -> None:
    """Measure both stores and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows; under 50 s")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        numbers = {
            **_features(Path(folder), 64 if arguments.quick else 512),
            **_targets(Path(folder), 16 if arguments.quick else 128),
        }
    print(f"{'':10}{'cache rows/s':>14}{'bare rows/s':>14}{'ratio':>8}")
    for name in ("features", "targets"):
        print(
            f"{name:10}{numbers[f'{name}_rows_per_second']:14.1f}"
            f"{numbers[f'{name}_bare_rows_per_second']:14.1f}{numbers[f'{name}_vs_bare']:8.2f}"
        )
    line = json.dumps(numbers)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)


def _features(folder: Path, rows: int) -> dict[str, float]:
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
    encoder = VisualEncoder(model, preprocess, None)
    noise = np.random.default_rng(0)
    paths = [str(folder / f"{i}.jpg") for i in range(rows)]
    for path in paths:
        coarse = Image.fromarray(noise.integers(0, 255, (32, 32, 3), np.uint8))
        coarse.resize((256, 256)).save(path, quality=90)
    pixels = [encoder.preprocess(open_picture(path)) for path in paths]

    def encode(batch: list[Any]) -> dict[str, np.ndarray]:
        return {"pooled": encoder.pooled_of(batch).numpy()}

    roles = Roles(read=lambda path: encoder.preprocess(open_picture(path)), encode=encode)
    spec = StoreSpec(arrays={"pooled": ArraySpec(dims={"visual": encoder.width})}, shard_rows=32)
    return _compare("features", folder, paths, pixels, roles, spec, batch_size=16)


def _targets(folder: Path, rows: int) -> dict[str, float]:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=LENGTH,
    )
    model = CLIPTextModel(config).eval()
    noise = np.random.default_rng(0)
    captions = [" ".join(map(str, noise.integers(1, VOCABULARY - 2, LENGTH))) for _ in range(rows)]

    @torch.no_grad()
    def encode(batch: list[str]) -> dict[str, np.ndarray]:
        ids = torch.tensor([[int(word) for word in caption.split()] for caption in batch])
        return {"embedding": model(input_ids=ids).last_hidden_state.numpy()}

    roles = Roles(read=str, encode=encode)
    dims = {"position": LENGTH, "channel": WIDTH}
    spec = StoreSpec(
        arrays={"embedding": ArraySpec(dims=dims, codec=Codec(dtype="float16"))}, shard_rows=8
    )
    return _compare("targets", folder, captions, captions, roles, spec, batch_size=8)


def _compare(
    name: str,
    folder: Path,
    rows: list[str],
    in_memory: list[Any],
    roles: Roles,
    spec: StoreSpec,
    *,
    batch_size: int,
) -> dict[str, float]:
    """Bare before and after the cache, so that a machine that slows down shows on both sides."""

    def bare() -> None:
        for start in range(0, len(in_memory), batch_size):
            roles.encode(in_memory[start : start + batch_size])

    def cached() -> None:
        fill(
            folder / f"{name}.zarr",
            rows,
            spec,
            lambda: roles,
            provenance={"model": "random"},
            params=FillingParams(batch_size=batch_size),
        )

    roles.encode(in_memory[:batch_size])  # warm up
    before, own, after = _seconds(bare), _seconds(cached), _seconds(bare)
    bare_rate, rate = 2 * len(rows) / (before + after), len(rows) / own
    return {
        f"{name}_vs_bare": rate / bare_rate,
        f"{name}_rows_per_second": rate,
        f"{name}_bare_rows_per_second": bare_rate,
    }


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
