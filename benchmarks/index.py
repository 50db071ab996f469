"""Approximate retrieval against exact search: recall, speed, memory and build time of every kind.

    python -m benchmarks.index [--quick] [--full] [--rows N] [--kinds KIND ...] [--json FILE]

--quick measures 100 000 vectors, the default 1 000 000, --full also 3 300 000 (the size of CC3M).

The vectors imitate embeddings of pictures: clusters of Zipf-like sizes, a spectrum that falls as a
power law (so all 256 directions carry something), norm 1. A query is a point near a stored vector,
pushed away by noise of the same spectrum, so that its first neighbour is clear and the next nine
are near-ties inside a cluster: recall@10 is hard, recall@1 is easy. Recall is against exact search.

Two speeds, both on all given threads and each against exact search at its best:
`speedup` is for one query at a time (a conversation; exact search is the faster of faiss and a
plain matrix product), `speedup_batched` for 1000 queries at once (exact search is then a blocked
matrix product, up to ten times faster per query than alone).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.retrieval import RetrievalIndex, build_index, set_search_threads
from pipeline.settings import IndexSettings

WIDTH, QUERIES, TIMED_ALONE, BLOCK = 256, 1000, 200, 50_000
NEIGHBOURS = 10
APPROXIMATE = ("hnsw", "ivf-sq8", "ivf-pq")


def _settings(kind: str, number: int) -> IndexSettings:
    # Larger indexes need more lists read for the same recall and can afford it.
    probes = 32 if number <= 300_000 else 64
    return IndexSettings.model_validate(
        {"kind": kind, "ivf_probes": probes, "rerank": 50 if kind == "ivf-pq" else 8}
    )


class Pictures:
    """Clustered unit vectors in blocks."""

    def __init__(self, number: int):
        self.number = number
        random = torch.Generator().manual_seed(0)
        self.spectrum = torch.arange(1, WIDTH + 1) ** -0.5
        clusters = round(number**0.5)
        self.centres = torch.randn(clusters, WIDTH, generator=random) * self.spectrum
        self.shares = torch.arange(1, clusters + 1) ** -0.8

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.number, BLOCK):
            yield torch.arange(start, min(start + BLOCK, self.number)), self._block(start)

    def _block(self, start: int) -> Tensor:
        random = torch.Generator().manual_seed(start + 1)
        size = min(BLOCK, self.number - start)
        own = self.shares.multinomial(size, replacement=True, generator=random)
        noise = torch.randn(size, WIDTH, generator=random) * self.spectrum
        return normalize(self.centres[own] + 0.7 * noise, dim=1)

    def queries(self) -> Tensor:
        """Points near every so-manieth stored vector, cosine about 0.9 with it."""
        random = torch.Generator().manual_seed(12345)
        blocks = range(0, self.number, BLOCK)
        each = -(-QUERIES // len(blocks))
        near = torch.cat([self._block(start)[:each] for start in blocks])[:QUERIES]
        push = torch.randn(len(near), WIDTH, generator=random) * self.spectrum
        return normalize(near + 0.5 * push / push.norm(dim=1, keepdim=True), dim=1)


def _alone(index: RetrievalIndex, queries: Tensor, times: int) -> np.ndarray:
    """Seconds per query, one at a time, after a warm-up."""
    index.nearest(queries[:1], NEIGHBOURS)
    taken = []
    for query in queries[:times].split(1):
        start = time.perf_counter()
        index.nearest(query, NEIGHBOURS)
        taken.append(time.perf_counter() - start)
    return np.array(taken)


def _batched(index: RetrievalIndex, queries: Tensor) -> tuple[float, Tensor]:
    """Seconds per query of one large batch, best of two, and the rows found."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        rows, _ = index.nearest(queries, NEIGHBOURS)
        best = min(best, (time.perf_counter() - start) / len(queries))
    return best, rows


def _matrix_product_alone(vectors: Tensor, queries: Tensor) -> float:
    taken = []
    for query in queries[:10]:
        start = time.perf_counter()
        (vectors @ query).topk(NEIGHBOURS)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def _saved_bytes(index: RetrievalIndex) -> int:
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder))
        return sum(path.stat().st_size for path in Path(folder).glob("vectors-*"))


def measure(number: int, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Exact search and the given kinds at one size; prints a line per kind as it goes."""
    pictures = Pictures(number)
    queries = pictures.queries()
    blocks = list(pictures)
    print(
        f"\n{number} vectors of width {WIDTH}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads\n"
        f"{'kind':9}{'recall@1':>9}{'recall@10':>10}{'speedup':>9}{'batched':>9}{'p50 ms':>8}"
        f"{'p99 ms':>8}{'queries/s':>11}{'bytes/vec':>11}{'build s':>9}",
        flush=True,
    )
    results: dict[str, dict[str, float]] = {}
    exact_rows, exact_alone, exact_batched = torch.empty(0), 0.0, 0.0
    for kind in ("flat", *kinds):
        start = time.perf_counter()
        index = build_index(
            blocks, _settings(kind, number), heads="benchmark", features="benchmark"
        )
        build = time.perf_counter() - start
        alone = _alone(index, queries, 20 if kind == "flat" else TIMED_ALONE)
        batched, rows = _batched(index, queries)
        if kind == "flat":
            stored = torch.cat([block for _, block in blocks])
            exact_alone = min(float(np.median(alone)), _matrix_product_alone(stored, queries))
            del stored
            exact_rows, exact_batched = rows, batched
        hits = (rows[:, :, None] == exact_rows[:, None, :]).any(1)
        results[kind] = {
            "recall_at_1": float((rows[:, 0] == exact_rows[:, 0]).double().mean()),
            "recall_at_10": float(hits.double().mean()),
            "speedup": exact_alone / float(np.median(alone)),
            "speedup_batched": exact_batched / batched,
            "p50_ms": 1e3 * float(np.median(alone)),
            "p99_ms": 1e3 * float(np.quantile(alone, 0.99)),
            "queries_per_s": 1 / batched,
            "bytes_per_vector": _saved_bytes(index) / number,
            "build_s": build,
        }
        r = results[kind]
        print(
            f"{kind:9}{r['recall_at_1']:9.4f}{r['recall_at_10']:10.4f}{r['speedup']:9.1f}"
            f"{r['speedup_batched']:9.1f}{r['p50_ms']:8.2f}{r['p99_ms']:8.2f}"
            f"{r['queries_per_s']:11.0f}{r['bytes_per_vector']:11.0f}{r['build_s']:9.1f}",
            flush=True,
        )
        del index
    good = [k for k, r in results.items() if r["recall_at_10"] >= 0.99 and r["speedup"] >= 20]
    print(f"recall@10 >= 0.99 at 20 times the speed of exact search: {', '.join(good) or 'none'}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 000 vectors only")
    parser.add_argument("--full", action="store_true", help="also 3 300 000 vectors")
    parser.add_argument("--rows", type=int, help="this many vectors instead")
    parser.add_argument("--kinds", nargs="+", choices=APPROXIMATE, default=APPROXIMATE)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    set_search_threads(given.threads)
    torch.set_num_threads(given.threads)
    sizes = [given.rows] if given.rows else [100_000] if given.quick else [1_000_000]
    if given.full:
        sizes.append(3_300_000)
    measured = {size: measure(size, given.kinds) for size in sizes}
    line = json.dumps({**measured[sizes[0]], "rows": sizes[0], "all_sizes": measured})
    if given.json:
        given.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
