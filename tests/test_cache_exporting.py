"""Stores in the formats of others, read back by the others' own readers."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from stage_runs import refusal, run
from test_cache_samples import captions, fill_sample, make_spec, value

from cache import DamagedRowsError, export_store, read_rows

DONE = [row for row in range(19) if row != 4]


@pytest.fixture(scope="module", params=["float16", "int8"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "s.zarr"
    rows = captions(19)
    rows[4] = "unreadable"
    fill_sample(path, rows, spec=make_spec(dtype=request.param))
    return path


def test_parquet(store: Path, tmp_path: Path) -> None:
    assert export_store(store, tmp_path / "s.parquet", "parquet") == 18
    table = pq.read_table(tmp_path / "s.parquet").combine_chunks()
    assert table["row"].to_pylist() == DONE
    for name, expected in read_rows(store, DONE).items():
        values = table[name].chunk(0).to_numpy_ndarray()
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values, expected)


def test_numpy_files(store: Path, tmp_path: Path) -> None:
    said = run("export-cache", str(store), str(tmp_path / "s"), "--to", "npy")
    assert "18 rows" in said
    assert np.load(tmp_path / "s/row.npy").tolist() == DONE
    np.testing.assert_array_equal(np.load(tmp_path / "s/empty_embedding.npy"), value(""))
    for name, expected in read_rows(store, DONE).items():
        np.testing.assert_array_equal(np.load(tmp_path / f"s/{name}.npy", mmap_mode="r"), expected)


def test_webdataset_shards(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "s", "webdataset")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [f"0000{i}.tar" for i in range(3)]
    samples: dict[int, dict[str, np.ndarray]] = {}
    for shard in (tmp_path / "s").iterdir():
        with tarfile.open(shard) as tar:
            for member in tar:
                row, name, kind = member.name.split(".")
                content = tar.extractfile(member)
                assert kind == "npy"
                assert content is not None
                samples.setdefault(int(row), {})[name] = np.load(io.BytesIO(content.read()))
    assert sorted(samples) == DONE
    for name, expected in read_rows(store, DONE).items():
        np.testing.assert_array_equal(np.stack([samples[row][name] for row in DONE]), expected)


def test_what_is_refused_and_what_a_damaged_row_costs(tmp_path: Path) -> None:
    path, out = tmp_path / "s.zarr", tmp_path / "out"
    fill_sample(path, captions(9))
    said = refusal("export-cache", str(path), str(out), "--to", "lance")
    assert "cannot be exported to 'lance', only to parquet, npy, webdataset" in said
    with (path / "pooled/c/0/0").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(DamagedRowsError, match="row"):
        export_store(path, out, "npy")
    assert not out.exists()
    fill_sample(path, captions(9), rebuild=True)
    export_store(path, out, "npy")  # what the failed one left is no hindrance
    with pytest.raises(ValueError, match="is there: name another path"):
        export_store(path, out, "npy")
    assert not list(tmp_path.glob(".*"))
