"""Readers of Zarr v3 that know nothing of us, and what they read of a store: the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from test_cache_samples import captions, fill_sample, make_spec

from cache import EmbeddingStore, open_store

CODECS: list[dict[str, Any]] = [
    {},
    {"compressor": "zstd"},
    {"compressor": "blosc-zstd", "dtype": "int8", "share_first": True},
    {"compressor": "blosc-lz4", "dtype": "float32"},
]


@pytest.fixture(scope="module", params=CODECS, ids=lambda codec: codec.get("compressor", "none"))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of 30 rows in shards of 8, of which the last is cut; one row failed, and is all zeros."""
    path, rows = tmp_path_factory.mktemp("stores") / "s.zarr", captions(30)
    rows[3] = "unreadable"
    fill_sample(path, rows, spec=make_spec(**request.param))
    return open_store(path)


def by_zarr(path: Path, name: str) -> np.ndarray:
    return np.asarray(zarr.open_group(path, mode="r")[name][...])


def by_zarrs(path: Path, name: str) -> np.ndarray:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return by_zarr(path, name)


def by_tensorstore(path: Path, name: str) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore")
    kvstore = {"driver": "file", "path": f"{path / name}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()


def by_xarray(path: Path, name: str) -> np.ndarray:
    xarray = pytest.importorskip("xarray")
    with xarray.open_zarr(path, consolidated=False, mask_and_scale=False) as dataset:
        return dataset[name].values


@pytest.mark.parametrize("read", [by_zarr, by_zarrs, by_tensorstore, by_xarray])
def test_others_read_what_we_read(
    store: EmbeddingStore, read: Callable[[Path, str], np.ndarray]
) -> None:
    path = store.location.path
    ours = {name: store.read_stored(name, 0, store.num_rows) for name in store.spec.arrays}
    ours["empty_embedding"] = store.constant("empty_embedding")
    tables = [child.name for child in path.iterdir() if child.is_dir() and child.name not in ours]
    assert {"row_status", "row_key", "row_reason", "embedding_checksum"} <= set(tables)
    ours |= {name: store.read_table(name) for name in tables}
    for name, values in ours.items():
        theirs = read(path, name)
        assert (theirs.dtype, theirs.shape) == (values.dtype, values.shape), name
        assert theirs.tobytes() == values.tobytes(), name
    assert ours["embedding"][4].any()
    assert not ours["embedding"][3].any()
