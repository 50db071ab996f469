"""Exact search among 3.3 million vectors of width 256: CC3M's size, the paper's p.

On the device as one matrix product and a top-10, and with faiss where it has GPU support; on the
CPU with faiss on all cores. The device's rows are held against the CPU's.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.gpu_measure import Machine, Numbers, Report, Unavailable

ROWS, WIDTH, NEIGHBOURS = 3_300_000, 256, 10


def search(machine: Machine, report: Report) -> None:
    """One query at a time, and 1000 at once."""
    rows, many = (2000, 50) if machine.toy else (ROWS, 1000)
    random = torch.Generator(machine.device).manual_seed(0)
    vectors = normalize(torch.randn(rows, WIDTH, generator=random, device=machine.device), dim=1)
    near = vectors[torch.arange(many, device=machine.device) * (rows // many)]
    push = torch.randn(many, WIDTH, generator=random, device=machine.device)
    queries = normalize(near + 0.5 * normalize(push, dim=1), dim=1)
    expected = (queries @ vectors.T).topk(NEIGHBOURS).indices.cpu()

    report.measure("torch, float32", partial(by_torch, machine, vectors, queries, expected))
    half = partial(by_torch, machine, vectors.bfloat16(), queries.bfloat16(), expected)
    report.measure("torch, bfloat16", half)
    report.measure(
        "faiss on the CPU", partial(by_faiss, machine, vectors, queries, expected, False)
    )
    report.measure("faiss on the GPU", partial(by_faiss, machine, vectors, queries, expected, True))


def by_torch(machine: Machine, vectors: Tensor, queries: Tensor, expected: Tensor) -> Numbers:
    """A matrix product and a top-10."""

    def nearest(some: Tensor) -> Tensor:
        return (some @ vectors.T).topk(NEIGHBOURS).indices

    return {
        "ms_alone": 1e3 * machine.seconds(lambda: nearest(queries[:1])),
        "queries_per_s": len(queries) / machine.seconds(lambda: nearest(queries)),
        "recall_at_10": recall(nearest(queries).cpu(), expected),
    }


def by_faiss(
    machine: Machine, vectors: Tensor, queries: Tensor, expected: Tensor, on_gpu: bool
) -> Numbers:
    """The product's own index."""
    from pipeline.retrieval import RetrievalError, build_index, set_search_threads
    from pipeline.settings import IndexSettings

    set_search_threads(os.cpu_count() or 1)
    blocks = list(zip(torch.arange(len(vectors)).split(100_000), vectors.cpu().split(100_000)))
    index: Any = build_index(blocks, IndexSettings(), heads="random", features="random")
    if on_gpu:
        try:
            index = index.to_gpu()
        except RetrievalError as error:
            raise Unavailable(str(error)) from error
    asked = queries.cpu()
    return {
        "ms_alone": 1e3 * machine.seconds(lambda: index.nearest(asked[:1], NEIGHBOURS)),
        "queries_per_s": len(asked)
        / machine.seconds(lambda: index.nearest(asked, NEIGHBOURS), warmups=1, times=2),
        "recall_at_10": recall(index.nearest(asked, NEIGHBOURS)[0], expected),
    }


def recall(found: Tensor, expected: Tensor) -> float:
    """Share of the expected rows that were found."""
    return float((found[:, :, None] == expected[:, None, :]).any(1).double().mean())
