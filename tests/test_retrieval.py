"""Retrieval against a plain matrix product, on clustered vectors, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.settings import IndexSettings
from pipeline.talking.index_files import load_index, save_index
from pipeline.talking.retrieval import (
    ExactOnDevice,
    IndexPart,
    RetrievalError,
    RetrievalIndex,
    build_index,
    search_together,
)

N, P = 3000, 32
KINDS = ("flat", "hnsw", "ivf-sq8", "ivf-pq")


def _vectors(number: int, seed: int = 0) -> Tensor:
    """Points of 40 clusters on the unit sphere."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, P, generator=torch.Generator().manual_seed(99))
    own = torch.randint(40, (number,), generator=random)
    return normalize(centres[own] + 0.8 * torch.randn(number, P, generator=random), dim=1)


VECTORS = _vectors(N)
# Rows are not positions: the rows of a cache that lost some pictures.
ROWS = torch.arange(N) * 3 + 7
QUERIES = normalize(
    VECTORS[::150] + 0.05 * torch.randn(20, P, generator=torch.Generator().manual_seed(7)), dim=1
)


def _blocks(vectors: Tensor, rows: Tensor, size: int = 700) -> list[tuple[Tensor, Tensor]]:
    return list(zip(rows.split(size), vectors.split(size)))


def _candidates(rows: Tensor) -> pa.Table:
    # In another order than the vectors, with lines that no vector asks for.
    everything = [*rows.flip(0).tolist(), 1_000_001]
    return pa.table(
        {
            "caption": [f"caption {row}" for row in everything],
            "row": everything,
            "image": [f"{row}.png" for row in everything],
        }
    )


def _settings(kind: str) -> IndexSettings:
    return IndexSettings.model_validate(
        {"kind": kind, "pq_bytes": 8, "ivf_lists": 32, "ivf_probes": 16, "rerank": 20}
    )


def _build(kind: str = "flat", number: int = N, **more: object) -> RetrievalIndex:
    blocks = _blocks(VECTORS[:number], ROWS[:number])
    return build_index(blocks, _settings(kind), heads="h1", features="f1", **more)  # type: ignore


def _exact(queries: Tensor, n: int, vectors: Tensor = VECTORS, rows: Tensor = ROWS) -> Tensor:
    return rows[(queries @ vectors.T).topk(n, dim=1).indices]


def _recall(found: Tensor, exact: Tensor) -> float:
    return float((found[:, :, None] == exact[:, None, :]).any(1).double().mean())


def test_flat_is_the_matrix_product() -> None:
    rows, scores = _build().nearest(QUERIES, 10)
    exact = (QUERIES @ VECTORS.T).topk(10, dim=1)
    assert torch.equal(rows, ROWS[exact.indices])
    torch.testing.assert_close(scores, exact.values, rtol=0, atol=1e-6)
    torch.testing.assert_close(_build().max_similarity(QUERIES), exact.values[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_the_neighbours_again_after_saving(kind: str, tmp_path: Path) -> None:
    index = _build(kind, candidates=_candidates(ROWS))
    save_index(index, tmp_path)
    loaded = load_index(tmp_path, heads="h1", features="f1")
    for queries in (QUERIES, QUERIES[:1]):
        rows, scores = loaded.nearest(queries, 10)
        assert _recall(rows, _exact(queries, 10)) >= 0.98
        assert torch.equal(rows, index.nearest(queries, 10)[0])
        true = (queries[:, None] * VECTORS[(rows - 7) // 3]).sum(2)
        torch.testing.assert_close(scores, true, rtol=0, atol=2e-3)
    assert (loaded.settings, loaded.parts) == (
        _settings(kind),
        (IndexPart(heads="h1", features="f1", rows=N),),
    )
    best = loaded.search(QUERIES[:1], 1)[0][0]
    assert (best.image, best.caption) == (f"{best.row}.png", f"caption {best.row}")
    assert best.row == 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_sees_every_picture_once(kind: str) -> None:
    index, query = _build(kind), QUERIES[:1]
    seen: list[int] = []
    for _ in range(6):
        found = [hit.row for hit in index.search(query, 5, exclude=seen)[0]]
        assert len(found) == 5
        assert not set(found) & set(seen)
        seen += found
    assert len(set(seen) & set(_exact(query, 30)[0].tolist())) >= (30 if kind == "flat" else 28)


def test_exclusion_is_by_row_and_leaves_no_place_empty() -> None:
    index, exact = _build(), _exact(QUERIES, 8)
    excluded = [int(exact[0, 0]), int(exact[0, 2]), 5, 5]  # 5 is no row of this index
    rows, _ = index.nearest(QUERIES, 6, exclude=excluded)
    assert rows[0].tolist() == [row for row in exact[0].tolist() if row not in excluded][:6]
    few = _build(number=4)
    rows, scores = few.nearest(QUERIES[:1], 5, exclude=[7])
    assert sorted(rows[0].tolist()) == [-1, -1, 10, 13, 16]
    assert scores[0, 3:].tolist() == [float("-inf")] * 2
    assert len(few.search(QUERIES[:1], 5, exclude=[7])[0]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_grows_without_starting_over(kind: str, tmp_path: Path) -> None:
    index = _build(kind, number=2000, candidates=_candidates(ROWS[:2000]))
    save_index(index, tmp_path)
    grown = load_index(tmp_path)
    later = _blocks(VECTORS[2000:], ROWS[2000:])
    grown.extend(later, heads="h1", features="f2", candidates=_candidates(ROWS[2000:]))
    save_index(grown, tmp_path)
    again = load_index(tmp_path, heads="h1", features=("f1", "f2"))
    assert len(again) == N
    assert again.parts == (
        IndexPart(heads="h1", features="f1", rows=2000),
        IndexPart(heads="h1", features="f2", rows=1000),
    )
    assert _recall(again.nearest(QUERIES, 10)[0], _exact(QUERIES, 10)) >= 0.97
    last = again.search(VECTORS[-1:], 1)[0][0]
    assert (last.row, last.image) == (int(ROWS[-1]), f"{int(ROWS[-1])}.png")
    assert len(list(tmp_path.iterdir())) == 3, "the files of the smaller index are gone"


def test_what_may_not_be_added() -> None:
    index = _build(number=100)
    with pytest.raises(RetrievalError, match="vectors of the heads h1, the new ones are of h2"):
        index.extend([], heads="h2", features="f1")
    with pytest.raises(RetrievalError, match="1 rows are in the index twice, the first is 10"):
        index.extend([(ROWS[1:2], VECTORS[1:2])], heads="h1", features="f1")
    with pytest.raises(RetrievalError, match="candidate table or none"):
        index.extend([], heads="h1", features="f1", candidates=_candidates(ROWS[:1]))


def test_several_collections_are_searched_as_one() -> None:
    halves = {
        "old": _build(number=1500),
        "new": build_index(
            _blocks(VECTORS[1500:], torch.arange(1500)), _settings("flat"), heads="h1", features="g"
        ),
    }
    found = search_together(halves, QUERIES, 10)
    whole = _build().search(QUERIES, 10)
    for merged, exact in zip(found, whole):
        assert [hit.score for hit in merged] == pytest.approx([hit.score for hit in exact])
        rows = [hit.row if hit.collection == "old" else (hit.row + 1500) * 3 + 7 for hit in merged]
        assert rows == [hit.row for hit in exact]
    best = found[0][0]
    without = search_together(halves, QUERIES, 10, {best.collection: [best.row]})
    assert without[0][0] == found[0][1]
    halves["new"].parts = (IndexPart(heads="h2", features="g", rows=1500),)
    with pytest.raises(RetrievalError, match="only with one heads"):
        search_together(halves, QUERIES, 10)


def test_an_index_of_other_heads_or_features_is_refused_naming_both(tmp_path: Path) -> None:
    save_index(_build(number=10), tmp_path)
    with pytest.raises(RetrievalError, match=r"built from heads h1, but the current heads are h9"):
        load_index(tmp_path, heads="h9")
    with pytest.raises(RetrievalError, match=r"built from features f1, but .* are f1, f2"):
        load_index(tmp_path, heads="h1", features=["f1", "f2"])
    assert len(load_index(tmp_path)) == 10


def test_damage_is_found_before_faiss_reads_the_file(tmp_path: Path) -> None:
    save_index(_build(number=10), tmp_path)
    vectors = next(tmp_path.glob("vectors-*.faiss"))
    intact = vectors.read_bytes()

    vectors.write_bytes(intact[:-1])
    with pytest.raises(RetrievalError, match=r"has \d+ bytes, index.json records \d+"):
        load_index(tmp_path)
    vectors.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(RetrievalError, match="damaged: its SHA-256 differs"):
        load_index(tmp_path)
    vectors.unlink()
    with pytest.raises(RetrievalError, match="is missing"):
        load_index(tmp_path)
    vectors.write_bytes(intact)

    record = tmp_path / "index.json"
    text = record.read_text()
    record.write_text(text.replace('"h1"', '"h2"'))
    with pytest.raises(RetrievalError, match="does not match its own checksum"):
        load_index(tmp_path)
    record.write_text("[]")
    with pytest.raises(RetrievalError, match="not the record of an index"):
        load_index(tmp_path)
    record.unlink()
    with pytest.raises(RetrievalError, match="there is no index"):
        load_index(tmp_path)


def test_a_save_that_fails_leaves_the_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_index(_build(number=10), tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("pipeline.talking.index_files.pq.write_table", full)
    with pytest.raises(OSError, match="no space"):
        save_index(_build(number=20), tmp_path)
    assert len(load_index(tmp_path)) == 10
    assert not list(tmp_path.glob(".*"))


def test_only_the_right_kind_of_file_is_given_to_faiss(tmp_path: Path) -> None:
    index = _build(number=10)
    index.settings = _settings("hnsw")  # a record that speaks of another kind than the file
    save_index(index, tmp_path)
    with pytest.raises(RetrievalError, match="not with the mark of hnsw"):
        load_index(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["settings"]["kind"] == "hnsw"


def test_vectors_that_are_not_unit_length_are_named() -> None:
    long = VECTORS[:9].clone()
    long[7] *= 1.01
    with pytest.raises(RetrievalError, match=r"vector 7 has norm 1\.01"):
        build_index(_blocks(long, ROWS[:9], 4), _settings("flat"), heads="h", features="f")
    long[7] = float("nan")
    with pytest.raises(RetrievalError, match="vector 7 has norm nan"):
        build_index(_blocks(long, ROWS[:9], 4), _settings("flat"), heads="h", features="f")
    index = _build(number=10)
    with pytest.raises(RetrievalError, match="query 0 has norm 2"):
        index.nearest(2 * QUERIES[:1], 1)
    with pytest.raises(RetrievalError, match=r"query of shape \(1, 5\), expected \[number, 32\]"):
        index.nearest(QUERIES[:1, :5], 1)
    with pytest.raises(RetrievalError, match="at least 1"):
        index.nearest(QUERIES, 0)


def test_a_build_that_cannot_work_is_refused() -> None:
    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield from _blocks(VECTORS, ROWS)

    with pytest.raises(RetrievalError, match="reads the vectors twice"):
        build_index(once(), _settings("ivf-sq8"), heads="h", features="f")
    for kind in ("flat", "ivf-pq"):
        with pytest.raises(RetrievalError, match="no vector"):
            build_index([], _settings(kind), heads="h", features="f")
    odd = IndexSettings(kind="ivf-pq", pq_bytes=7)
    with pytest.raises(RetrievalError, match=r"does not divide p = 32"):
        build_index(_blocks(VECTORS, ROWS), odd, heads="h", features="f")
    with pytest.raises(RetrievalError, match="lacks 1 of 10 rows, the first is 34"):
        _build(number=10, candidates=_candidates(ROWS[:9]))
    with pytest.raises(RetrievalError, match=r"lacks the columns \['caption'\]"):
        _build(number=10, candidates=_candidates(ROWS).drop_columns(["caption"]))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU with 4 MB free, whose tensors lie on the CPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4_000_000, 8_000_000))
    to = Tensor.to

    def onto(self: Tensor, *place: object) -> Tensor:
        return self if place == (torch.device("cuda"),) else to(self, *place)  # type: ignore

    monkeypatch.setattr(Tensor, "to", onto)
    return torch.device("cuda")


def test_an_exact_index_is_searched_on_the_gpu(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = _build(candidates=_candidates(ROWS))
    moved = index.on(gpu)
    assert isinstance(moved.vectors, ExactOnDevice)
    monkeypatch.setattr(ExactOnDevice, "_SCORES", 3 * N)  # three queries at a time
    rows, scores = moved.nearest(QUERIES, 10, exclude=[7])
    expected = index.nearest(QUERIES, 10, exclude=[7])
    assert torch.equal(rows, expected[0])
    torch.testing.assert_close(scores, expected[1], rtol=0, atol=1e-6)
    assert [[hit.image for hit in hits] for hits in moved.search(QUERIES, 3)] == [
        [hit.image for hit in hits] for hits in index.search(QUERIES, 3)
    ]
    with pytest.raises(RetrievalError, match="on a GPU: load it again and extend"):
        moved.extend([], heads="h1", features="f2")
    with pytest.raises(RetrievalError, match="on a GPU: save the one"):
        save_index(moved, tmp_path)


def test_an_index_stays_on_the_cpu_where_a_gpu_is_no_gain_or_too_small(gpu: torch.device) -> None:
    for index in (_build("ivf-sq8"), _build("hnsw", number=100)):
        assert index.on(gpu) is index
    exact = _build()
    assert exact.on(torch.device("cpu")) is exact
    large = build_index(
        [(torch.arange(4000), _vectors(4000))], _settings("flat"), heads="h", features="f"
    )
    assert large.on(gpu) is large, "512 kB of 4 MB are more than an eighth"


def test_codes_hold_the_leading_directions_and_scores_the_whole_vectors() -> None:
    spectrum = torch.arange(1, P + 1) ** -1.0
    vectors = normalize(torch.randn(N, P, generator=torch.Generator().manual_seed(1)) * spectrum)
    built = {
        rerank: build_index(
            [(torch.arange(N), vectors)],
            _settings("ivf-sq8").model_copy(update={"rerank": rerank, "ivf_probes": 32}),
            heads="h",
            features="f",
        )
        for rerank in (0, 20)
    }
    # 16 of 32 directions hold 97% of the squared norm; every list is read.
    coded = faiss.extract_index_ivf(built[20].vectors)
    assert (coded.d, faiss.extract_index_ivf(built[0].vectors).d) == (16, P)
    rows, scores = built[20].nearest(vectors[:50], 10)
    exact = (vectors[:50] @ vectors.T).topk(10)
    assert _recall(rows, exact.indices) >= 0.99
    torch.testing.assert_close(scores, exact.values, rtol=0, atol=2e-3)


def test_an_index_of_whole_codes_is_still_read(tmp_path: Path) -> None:
    """As `ivf-sq8` was built before."""
    vectors = faiss.index_factory(P, "IVF32,SQ8,Refine(SQfp16)", faiss.METRIC_INNER_PRODUCT)
    faiss.extract_index_ivf(vectors).nprobe = 16
    vectors.k_factor = 8
    vectors.train(VECTORS.numpy())
    vectors.add(VECTORS.numpy())
    part = IndexPart(heads="h1", features="f1", rows=N)
    save_index(RetrievalIndex(vectors, ROWS.numpy(), _settings("ivf-sq8"), (part,), None), tmp_path)
    loaded = load_index(tmp_path)
    assert _recall(loaded.nearest(QUERIES, 10)[0], _exact(QUERIES, 10)) >= 0.98
    loaded.extend([(torch.tensor([1]), -VECTORS[:1])], heads="h1", features="f2")
    assert loaded.search(-VECTORS[:1], 1)[0][0].row == 1


def test_progress_counts_rows_and_a_stream_is_read_once_by_flat() -> None:
    told: list[int] = []
    stream = iter(_blocks(VECTORS, ROWS, 1000))
    build_index(stream, _settings("flat"), heads="h", features="f", progress=told.append)
    assert told == [1000, 2000, 3000]


def test_the_training_sample_is_uniform_over_the_stream() -> None:
    from pipeline.talking.retrieval import _random_sample

    angle = torch.arange(4000) / 4000
    stream = torch.stack([angle.cos(), angle.sin()], 1)
    sample, total = _random_sample(_blocks(stream, torch.arange(4000), 300), 500, seed=3)
    assert total == 4000
    assert sample.shape == (500, 2)
    places = np.arctan2(sample[:, 1], sample[:, 0])
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() > 90  # 125 expected
    assert len(np.unique(places)) == 500
