"""Retrieval over the candidate pictures: nearest vectors by cosine similarity.

    blocks of (row [b] int64, W_i2t v_phi(x) [b, p] float32, norm 1)  ->  RetrievalIndex
    query W_t2i h([IMG1]) [Q, p], norm 1  ->  [[Retrieved(row, score, image, caption), ...], ...]

Paper: section 3.2 (retrieval by the highest cosine similarity, p = 256). Vectors have norm 1, so
the inner product is the cosine. `flat` is exact; the other kinds trade recall for speed
(`python -m benchmarks.index` measures by how much).

`pipeline.talking.index_files` keeps an index in a folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float32, Int64
from pydantic import Field
from torch import Tensor

from gill_errors import InputError
from gill_records import Record
from pipeline.settings import IndexSettings

Block = tuple[Tensor, Tensor]

_NORM_TOLERANCE = 1e-3
_CODED_SHARE = 0.89


class RetrievalError(InputError):
    """An index or a query cannot be used: what is wrong, where, and what to do."""


class IndexPart(Record):
    """One batch of pictures in an index: the first build or a later extension."""

    heads: str = Field(description="fingerprint of the heads that gave W_i2t")
    features: str = Field(description="fingerprint of the feature cache that gave v_phi")
    rows: int = Field(ge=0, description="number of pictures")


@dataclass(frozen=True, slots=True)
class Retrieved:
    """One retrieved picture.

    `score` is its cosine similarity with the query; `image` (path, `shard.tar#member` or URL) and
    `caption` are None where the index was built without a candidate table; `collection` is the name
    under which `search_together` was given the index.
    """

    row: int
    score: float
    image: str | None = None
    caption: str | None = None
    collection: str = ""


class ExactOnDevice:
    """Vectors on a torch device, searched exactly, with the part of faiss's interface for it."""

    _SCORES = 2**26  # held at a time: 256 MB

    def __init__(self, vectors: Float32[Tensor, "N p"]):
        self._vectors = vectors
        self.d = vectors.shape[1]

    def search(
        self, queries: Float32[np.ndarray, "Q p"], n: int
    ) -> tuple[Float32[np.ndarray, "Q n"], Int64[np.ndarray, "Q n"]]:
        """Scores and positions of the n highest inner products per query."""
        parts = torch.from_numpy(queries).split(max(1, self._SCORES // len(self._vectors)))
        found = [(part.to(self._vectors) @ self._vectors.T).topk(n) for part in parts]
        scores, positions = (torch.cat(column).cpu().numpy() for column in zip(*found))
        return scores, positions


class RetrievalIndex:
    """Candidate vectors with their rows, and where given, their pictures and captions."""

    def __init__(
        self,
        vectors: Any,
        rows: Int64[np.ndarray, " N"],
        settings: IndexSettings,
        parts: tuple[IndexPart, ...],
        candidates: pa.Table | None,
    ):
        self.settings, self.parts = settings, parts
        self.rows = rows
        self.candidates = candidates
        self.vectors = vectors
        """The faiss index, or `ExactOnDevice`; position i of it is `rows[i]`."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """p, the width of the vectors."""
        return int(self.vectors.d)

    @property
    def is_for_searching_only(self) -> bool:
        """Whether it is a copy on a GPU, which can be neither extended nor saved."""
        return isinstance(self.vectors, ExactOnDevice)

    @property
    def heads(self) -> str:
        """The fingerprint of the heads that all vectors come from."""
        return self.parts[0].heads

    def extend(
        self,
        blocks: Iterable[Block],
        *,
        heads: str,
        features: str,
        candidates: pa.Table | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Add pictures to this index, in memory; `save_index` makes it permanent.

        `blocks` and `candidates` are as for `build_index`. The new part is recorded with its
        fingerprints. Inverted lists stay where the first build placed them: after an extension by
        pictures of another kind, build anew.

        RetrievalError when the heads differ, a row is already in the index or repeated, a vector is
        not finite or not of norm 1, or the candidate table does not fit. After an error drop this
        object and load the saved index again; nothing on disk has changed.
        """
        if self.is_for_searching_only:
            raise RetrievalError("this index is on a GPU: load it again and extend that copy")
        if heads != self.heads:
            raise RetrievalError(
                f"the index holds vectors of the heads {self.heads}, the new ones are of {heads}: "
                "their scores cannot be compared; embed with the same heads or build a new index"
            )
        if (candidates is None) != (self.candidates is None):
            raise RetrievalError("either all parts of an index have a candidate table or none has")
        added = _add(self.vectors, blocks, self.rows, progress)
        if candidates is not None:
            self.candidates = pa.concat_tables([self.candidates, _in_order(candidates, added)])
        self.rows = np.concatenate([self.rows, added])
        self.parts = (*self.parts, IndexPart(heads=heads, features=features, rows=len(added)))

    def nearest(
        self, queries: Float[Tensor, "Q p"], n: int, exclude: Collection[int] = ()
    ) -> tuple[Int64[Tensor, "Q n"], Float32[Tensor, "Q n"]]:
        """The rows of the n nearest candidates of every query, best first, and their cosines.

        `exclude` are rows that must not come back (pictures already shown): n + len(exclude) are
        fetched and exactly these left out, so no place is lost to them. Where fewer than n
        candidates are found the rest has row -1 and score -inf.

        RetrievalError when a query is not finite, not of norm 1 or not p wide, or n < 1.
        """
        positions, scores = self._nearest(queries, n, exclude)
        # Position -1 reads the last row here, and is replaced.
        rows = np.where(positions >= 0, self.rows[positions], -1)
        return torch.from_numpy(rows), torch.from_numpy(scores)

    def search(
        self, queries: Float[Tensor, "Q p"], n: int, exclude: Collection[int] = ()
    ) -> list[list[Retrieved]]:
        """`nearest`, with pictures and captions; a list may be shorter than n."""
        positions, scores = self._nearest(queries, n, exclude)
        return [
            [self._retrieved(position, score) for position, score in zip(*pair) if position >= 0]
            for pair in zip(positions.tolist(), scores.tolist())
        ]

    def max_similarity(self, queries: Float[Tensor, "Q p"]) -> Float32[Tensor, " Q"]:
        """The highest cosine over all candidates: what `decision` reads (paper, appendix C)."""
        return self.nearest(queries, 1)[1][:, 0]

    def on(self, device: torch.device) -> RetrievalIndex:
        """This index as it is best searched beside a model on `device`.

        An exact index goes onto a GPU where it takes at most an eighth of the memory that is free
        there: a copy for searching only. Otherwise it is this one, searched on the CPU.
        """
        if device.type != "cuda" or self.settings.kind != "flat":
            return self
        if 8 * 4 * len(self) * self.width > torch.cuda.mem_get_info(device)[0]:
            return self
        stored = torch.from_numpy(self.vectors.reconstruct_n(0, len(self)))
        moved = ExactOnDevice(stored.to(device))
        return RetrievalIndex(moved, self.rows, self.settings, self.parts, self.candidates)

    def _nearest(
        self, queries: Float[Tensor, "Q p"], n: int, exclude: Collection[int]
    ) -> tuple[Int64[np.ndarray, "Q n"], Float32[np.ndarray, "Q n"]]:
        if n < 1:
            raise RetrievalError(f"asked for {n} pictures; ask for at least 1")
        unit = _checked(queries, "query", self.width)
        fetched = min(n + len(set(exclude)), len(self))
        with _threads_for(len(unit)):
            scores, positions = self.vectors.search(unit, fetched)
        if fetched == n and not len(exclude) and positions.min() >= 0:
            return positions, scores  # nothing to leave out: most queries, and worth 0.1 ms
        excluded = np.fromiter(set(exclude), np.int64)
        # faiss fills up with -1 where the lists it looked through held too few.
        lost = (positions < 0) | np.isin(self.rows[positions], excluded)
        # A stable sort on "left out" moves the others forward and keeps their order.
        order = np.argsort(lost, axis=1, kind="stable")[:, :n]
        lost = np.take_along_axis(lost, order, 1)
        positions = np.where(lost, -1, np.take_along_axis(positions, order, 1))
        scores = np.where(lost, -np.inf, np.take_along_axis(scores, order, 1)).astype(np.float32)
        # Fewer columns than n where there are fewer candidates than n.
        missing = ((0, 0), (0, n - positions.shape[1]))
        positions = np.pad(positions, missing, constant_values=-1)
        return positions, np.pad(scores, missing, constant_values=-np.inf)

    def _retrieved(self, position: int, score: float) -> Retrieved:
        row = int(self.rows[position])
        if self.candidates is None:
            return Retrieved(row, score)
        image, caption = (self.candidates[name][position].as_py() for name in ("image", "caption"))
        return Retrieved(row, score, image, caption)


def build_index(
    blocks: Iterable[Block],
    settings: IndexSettings,
    *,
    heads: str,
    features: str,
    candidates: pa.Table | None = None,
    progress: Callable[[int], None] | None = None,
) -> RetrievalIndex:
    """An index over all candidate vectors, one block in memory at a time.

    `blocks` gives (rows [b] int64, vectors [b, p] float32 of norm 1). The `ivf` kinds read it twice
    (a random sample first), so a generator will not do for them: give an object that starts anew
    on every `iter`, such as a list or a class with `__iter__`. `candidates` is a table with the
    columns row (int64), image and caption (text), at least one line per indexed row. `progress` is
    told the number of rows added so far.

    RetrievalError when there is no vector, a vector is not finite or not of norm 1, a row repeats,
    or the candidate table lacks a row or a column.
    """
    # Lists are placed before anything is added, by a sample of all; the other kinds need none.
    if settings.kind.startswith("ivf"):
        if iter(blocks) is blocks:
            raise RetrievalError(
                f"{settings.kind} reads the vectors twice: give blocks that can be iterated again"
            )
        vectors = _trained_lists(blocks, settings)
    else:
        width, blocks = _peek_width(blocks)
        vectors = _empty(settings, width)
    rows = _add(vectors, blocks, np.empty(0, np.int64), progress)
    table = None if candidates is None else _in_order(candidates, rows)
    part = IndexPart(heads=heads, features=features, rows=len(rows))
    return RetrievalIndex(vectors, rows, settings, (part,), table)


def search_together(
    indexes: Mapping[str, RetrievalIndex],
    queries: Float[Tensor, "Q p"],
    n: int,
    exclude: Mapping[str, Collection[int]] | None = None,
) -> list[list[Retrieved]]:
    """The n best of several collections per query, each naming its collection.

    `exclude` maps a collection to the rows of it that must not come back. RetrievalError when the
    collections were embedded by different heads, whose scores cannot be compared.
    """
    heads = {name: index.heads for name, index in indexes.items()}
    if len(set(heads.values())) != 1:
        raise RetrievalError(f"collections can be searched together only with one heads: {heads}")
    seen = exclude or {}
    answers = [
        [[replace(hit, collection=name) for hit in hits] for hits in found]
        for name, index in indexes.items()
        for found in [index.search(queries, n, seen.get(name, ()))]
    ]
    return [
        sorted((hit for hits in per_query for hit in hits), key=lambda hit: -hit.score)[:n]
        for per_query in zip(*answers)
    ]


@contextlib.contextmanager
def _threads_for(queries: int) -> Iterator[None]:
    # faiss divides the work by queries, so a lone one has nothing to share; waking a second thread
    # for a search of 0.1 ms costs more than that, and milliseconds where the other core is busy.
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(min(before, max(1, queries // 8)))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _empty(settings: IndexSettings, width: int) -> Any:
    if settings.kind == "flat":
        return faiss.IndexFlatIP(width)
    graph = faiss.IndexHNSWFlat(width, settings.hnsw_links, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = settings.hnsw_build_effort
    graph.hnsw.efSearch = settings.hnsw_search_effort
    return graph


def _trained_lists(blocks: Iterable[Block], settings: IndexSettings) -> Any:
    sample, total = _random_sample(blocks, settings.ivf_training_vectors, settings.seed)
    width = sample.shape[1]
    # faiss's rule of thumb: 4 to 16 times the root of the number of vectors.
    lists = settings.ivf_lists or round(4 * total**0.5)
    lists = max(1, min(lists, len(sample) // 39))  # faiss asks for 39 vectors to place one list
    directions = None
    if settings.kind == "ivf-sq8":
        codes = "SQ8"
        # Without the second look the codes alone give the scores, and have to be whole.
        directions = _leading_directions(sample) if settings.rerank else None
    elif width % (2 * settings.pq_bytes) == 0:
        # 4 bits a code, so two codes a byte, each for an equal part of the vector.
        codes = f"PQ{2 * settings.pq_bytes}x4fs"
    else:
        raise RetrievalError(
            f"pq_bytes {settings.pq_bytes}: twice that does not divide p = {width}"
        )
    coded = width if directions is None else len(directions)
    vectors: Any = faiss.index_factory(coded, f"IVF{lists},{codes}", faiss.METRIC_INNER_PRODUCT)
    vectors.nprobe = settings.ivf_probes
    vectors.cp.seed = settings.seed + 1
    # More vectors than this do not place a list better; they only take time.
    vectors.cp.max_points_per_centroid = 64
    if directions is not None:
        onto = faiss.LinearTransform(width, coded, False)
        faiss.copy_array_to_vector(directions.ravel(), onto.A)
        onto.is_trained = True
        vectors = faiss.IndexPreTransform(onto, vectors)
    if settings.rerank:
        halves = faiss.ScalarQuantizer.QT_fp16
        whole = faiss.IndexScalarQuantizer(width, halves, faiss.METRIC_INNER_PRODUCT)
        vectors = faiss.IndexRefine(vectors, whole)
        vectors.k_factor = settings.rerank
    vectors.train(sample)
    return vectors


def _leading_directions(sample: Float32[np.ndarray, "s p"]) -> Float32[np.ndarray, "d p"]:
    """Orthonormal directions that hold `_CODED_SHARE` of the sample's squared norm, the best first.

    The inner products along them choose the candidates, which are then scored whole: fewer numbers
    to read per vector, and every list and code as much shorter. Not centred, as in principal
    component analysis: a shift would change the order of inner products.
    """
    shares, directions = np.linalg.eigh(sample.T @ sample)
    held = np.cumsum(shares[::-1]) / shares.sum()
    number = int(np.searchsorted(held, _CODED_SHARE)) + 1
    # faiss reads 16 numbers at a time.
    number = min(sample.shape[1], -(-number // 16) * 16)
    return np.ascontiguousarray(directions.T[::-1][:number])


def _random_sample(
    blocks: Iterable[Block], size: int, seed: int
) -> tuple[Float32[np.ndarray, "s p"], int]:
    """A uniform sample of at most `size` vectors of a stream, and the length of the stream.

    Every vector draws a random key; the vectors with the smallest keys stay.
    """
    random = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    keys = np.empty(0)
    total, width = 0, None
    for _, vectors in blocks:
        block = _checked(vectors, "vector", width, offset=total)
        total, width = total + len(block), block.shape[1]
        kept.append(block)
        # One key per vector in the order of the stream: how it is cut into blocks changes nothing.
        keys = np.concatenate([keys, random.random(len(block))])
        # At twice the size, so that memory is bounded and pruning seldom.
        if len(keys) > 2 * size:
            kept, keys = _smallest(kept, keys, size)
    if total == 0:
        raise RetrievalError("there is no vector to index")
    kept, keys = _smallest(kept, keys, size)
    return kept[0], total


def _smallest(
    kept: list[np.ndarray], keys: np.ndarray, size: int
) -> tuple[list[np.ndarray], np.ndarray]:
    vectors = np.concatenate(kept)
    if len(keys) > size:
        # Back in the order of the stream, which `argpartition` does not keep.
        chosen = np.sort(np.argpartition(keys, size)[:size])
        vectors, keys = vectors[chosen], keys[chosen]
    return [vectors], keys


def _peek_width(blocks: Iterable[Block]) -> tuple[int, Iterator[Block]]:
    iterator = iter(blocks)
    first = next(iterator, None)
    if first is None:
        raise RetrievalError("there is no vector to index")

    def again() -> Iterator[Block]:
        yield first
        yield from iterator

    return int(first[1].shape[-1]), again()


def _add(
    vectors: Any,
    blocks: Iterable[Block],
    present: Int64[np.ndarray, " N"],
    progress: Callable[[int], None] | None,
) -> Int64[np.ndarray, " added"]:
    """Add all blocks to `vectors`; the rows added, in order."""
    added: list[np.ndarray] = []
    number = 0
    for rows, block in blocks:
        unit = _checked(block, "vector", int(vectors.d), offset=number)
        if rows.shape != (len(unit),) or rows.dtype != torch.int64:
            raise RetrievalError(
                f"a block of {len(unit)} vectors came with rows {rows.dtype} {tuple(rows.shape)}"
            )
        if len(rows) and int(rows.min()) < 0:
            raise RetrievalError(f"row {int(rows.min())} is negative")
        vectors.add(unit)
        added.append(rows.numpy().copy())
        number += len(unit)
        if progress is not None:
            progress(number)
    fresh = np.concatenate(added) if added else np.empty(0, np.int64)
    values, counts = np.unique(np.concatenate([present, fresh]), return_counts=True)
    if (counts > 1).any():
        repeated = values[counts > 1]
        raise RetrievalError(
            f"{len(repeated)} rows are in the index twice, the first is {repeated[0]}: give every "
            "picture one row, and extend an index by new rows only"
        )
    return fresh


def _checked(
    vectors: Float[Tensor, "b p"], what: str, width: int | None, offset: int = 0
) -> Float32[np.ndarray, "b p"]:
    """The vectors as faiss takes them, or an error naming the first bad one."""
    if vectors.ndim != 2 or (width is not None and vectors.shape[1] != width):
        raise RetrievalError(f"{what} of shape {tuple(vectors.shape)}, expected [number, {width}]")
    unit = vectors.detach().to("cpu", torch.float32).contiguous().numpy()
    squares = np.einsum("bp,bp->b", unit, unit)
    # This way round, NaN is bad as well. Of a lone query, every step here is a hundredth.
    good = np.abs(squares - 1) <= 2 * _NORM_TOLERANCE
    if not good.all():
        first = int(good.argmin())
        raise RetrievalError(
            f"{what} {offset + first} has norm {np.sqrt(squares[first]):.4g}, expected 1: "
            "normalise the vectors before indexing or searching"
        )
    return unit


def _in_order(candidates: pa.Table, rows: Int64[np.ndarray, " n"]) -> pa.Table:
    """The lines of the candidate table in the order of `rows`."""
    missing = {"row", "image", "caption"} - set(candidates.column_names)
    if missing:
        raise RetrievalError(f"the candidate table lacks the columns {sorted(missing)}")
    known = candidates["row"].to_numpy()
    order = np.argsort(known, kind="stable")
    # The first line of each row, where it has several; past the end for a row above all known ones.
    place = np.searchsorted(known[order], rows)
    found = place < len(known)
    found[found] = known[order[place[found]]] == rows[found]
    if not found.all():
        raise RetrievalError(
            f"the candidate table lacks {int((~found).sum())} of {len(rows)} rows, the first is "
            f"{rows[~found][0]}"
        )
    text = pa.string()
    columns = candidates.select(["row", "image", "caption"]).take(pa.array(order[place]))
    return columns.cast(pa.schema([("row", pa.int64()), ("image", text), ("caption", text)]))
