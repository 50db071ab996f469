"""CLIP ViT-L/14's pooled vectors of pictures: random weights, bfloat16, 224 x 224 pixels.

Three rates that have to meet for the stage to reach the model's own: the model on pixels that are
on the device, with pixels that come from the CPU, and the opening and preparing of JPEG files by
as many threads as there are cores. Then the three together, through the cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image

from benchmarks.gpu_measure import Machine, Numbers, Report, transformer_operations
from corpora.pictures import open_picture
from pipeline.devices import Arriving, sent
from pipeline.visual_encoder import VisualEncoder

VIT_L = CLIPVisionCfg(layers=24, width=1024, head_width=64, patch_size=14, image_size=224)
TOY = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32)


def features(machine: Machine, report: Report) -> None:
    """The model, the way to it, and the stage."""
    encoder, config = vit(machine)
    sizes = (4,) if machine.toy else (64, 256, 512)
    for size in sizes:
        report.measure(f"model, batch {size}", partial(model_alone, machine, encoder, config, size))
    size = sizes[min(1, len(sizes) - 1)]
    report.measure(f"from the CPU, batch {size}", partial(from_cpu, machine, encoder, config, size))
    with jpeg_files(8 if machine.toy else 512) as paths:
        report.measure("opening files", partial(opening, machine, encoder, paths))
        report.measure(
            f"through the cache, batch {size}",
            partial(through_cache, machine, encoder, config, paths, size),
        )
    report.measure(f"kernels, batch {size}", partial(profiled, machine, encoder, size))


def features_compiled(machine: Machine, report: Report) -> None:
    """The model compiled: what fusing its elementwise operations would bring."""
    encoder, config = vit(machine)
    size = 4 if machine.toy else 256
    model: Any = encoder.model
    model.visual.compile(dynamic=False, backend=machine.compiler)

    def compiled() -> Numbers:
        start = time.perf_counter()
        numbers = model_alone(machine, encoder, config, size)
        return {**numbers, "s_with_compiling": time.perf_counter() - start}

    report.measure(f"compiled model, batch {size}", compiled)


def vit(machine: Machine) -> tuple[VisualEncoder, CLIPVisionCfg]:
    """The encoder as `load_visual_encoder` makes it, without a file; its text side is small."""
    config = TOY if machine.toy else VIT_L
    text = CLIPTextCfg(context_length=8, vocab_size=16, width=16, heads=2, layers=1)
    with torch.device(machine.device):
        model = CLIP(16, config, text, quick_gelu=True)
    preprocess: Any = open_clip.image_transform(
        config.image_size,
        is_train=False,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
    )
    return VisualEncoder(model.to(machine.device, torch.bfloat16), preprocess, None), config


def operations(config: CLIPVisionCfg) -> float:
    """FLOP per picture: the transformer and the patches' convolution."""
    assert isinstance(config.layers, int)
    assert isinstance(config.image_size, int)
    patches = (config.image_size // config.patch_size) ** 2
    embedding = 2 * patches * 3 * config.patch_size**2 * config.width
    return transformer_operations(config.layers, config.width, patches + 1) + embedding


def model_alone(
    machine: Machine, encoder: VisualEncoder, config: CLIPVisionCfg, size: int
) -> Numbers:
    """Pixels on the device already, in the model's dtype."""
    pixels = torch.randn(size, 3, *encoder.image_size, device=machine.device, dtype=torch.bfloat16)
    seconds = machine.seconds(lambda: encoder.pooled(pixels))
    return _rates(machine, config, size, seconds)


def from_cpu(machine: Machine, encoder: VisualEncoder, config: CLIPVisionCfg, size: int) -> Numbers:
    """Batches of the stage in a row: prepared pictures in, NumPy arrays out."""
    pictures = [torch.randn(3, *encoder.image_size) for _ in range(size)]
    batches = 2 if machine.toy else 8

    def encode() -> None:
        for vectors in [encoded(encoder, pictures) for _ in range(batches)]:
            np.asarray(vectors)

    return _rates(machine, config, batches * size, machine.seconds(encode, warmups=1, times=3))


def encoded(encoder: VisualEncoder, pictures: list[Any]) -> Arriving:
    """As stages/precompute_features.py does it."""
    return Arriving(encoder.pooled(sent(torch.stack(pictures), encoder.device)))


def opening(machine: Machine, encoder: VisualEncoder, paths: list[str]) -> Numbers:
    """JPEG files decoded, resized, cropped and normalised by all cores' threads."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:

        def all_files() -> None:
            for _ in pool.map(lambda path: encoder.preprocess(open_picture(path)), paths):
                pass

        seconds = machine.seconds(all_files, warmups=1, times=3)
    return {"pictures_per_s": len(paths) / seconds, "threads": threads}


def through_cache(
    machine: Machine, encoder: VisualEncoder, config: CLIPVisionCfg, paths: list[str], size: int
) -> Numbers:
    """The whole stage: files to a Zarr store, every file eight times under other names."""
    from cache import ArraySpec, FillingParams, Roles, StoreSpec, fill

    rows = [f"{i}\t{path}" for i in range(1 if machine.toy else 8) for path in paths]

    def encode(pixels: list[Any]) -> dict[str, Any]:
        return {"pooled": encoded(encoder, pixels)}

    def read(row: str) -> Any:
        return encoder.preprocess(open_picture(row.split("\t")[1]))

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        fill(
            Path(folder, "features.zarr"),
            rows,
            StoreSpec(arrays={"pooled": ArraySpec(dims={"visual": encoder.width})}),
            lambda: Roles(read=read, encode=encode),
            provenance={"model": "random"},
            params=FillingParams(batch_size=size, num_readers=os.cpu_count() or 1),
        )
        seconds = time.perf_counter() - start
    return _rates(machine, config, len(rows), seconds)


def profiled(machine: Machine, encoder: VisualEncoder, size: int) -> Numbers:
    """Where the model's time goes."""
    pixels = torch.randn(size, 3, *encoder.image_size, device=machine.device, dtype=torch.bfloat16)
    seconds = machine.seconds(lambda: encoder.pooled(pixels))
    return machine.kernels(lambda: encoder.pooled(pixels), seconds)


@contextmanager
def jpeg_files(count: int) -> Iterator[list[str]]:
    """Files of 500 x 375 pixels, smooth enough to be as large as photographs are."""
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{i}.jpg")) for i in range(count)]
        for path in paths:
            coarse = Image.fromarray(noise.integers(0, 255, (48, 64, 3), np.uint8))
            coarse.resize((500, 375)).save(path, quality=90)
        yield paths


def _rates(machine: Machine, config: CLIPVisionCfg, size: int, seconds: float) -> Numbers:
    return {
        "pictures_per_s": size / seconds,
        **machine.rate(size * operations(config), seconds),
    }
