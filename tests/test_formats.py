"""docs/formats.md is enough: a store is read by that page alone, without the room that wrote it."""

import hashlib
import json
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from test_cache_samples import captions, fill_sample, value

ROWS, SHARD_ROWS = 11, 8


def test_a_shard_is_read_as_the_page_says(tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    fill_sample(store, captions(ROWS))
    meta = json.loads((store / "zarr.json").read_text())["attributes"]["embedding_cache"]
    assert meta["format"] == 1
    assert meta["spec"]["shard_rows"] == SHARD_ROWS
    codec = meta["spec"]["arrays"]["embedding"]["codec"]
    assert (codec["dtype"], codec["compressor"]) == ("float16", "none")
    shape = list(meta["spec"]["arrays"]["embedding"]["dims"].values())
    shape[0] -= codec["share_first"]

    group = zarr.open(store, mode="r")
    content = (store / "embedding/c/1/0/0").read_bytes()
    inner = group["embedding"].chunks[0]
    index = SHARD_ROWS // inner * 16
    assert google_crc32c.value(content[-4 - index : -4]) == int.from_bytes(content[-4:], "little")
    offset, length = np.frombuffer(content[-4 - index : -4], "<u8")[:2].tolist()
    values = np.frombuffer(content[offset : offset + length], "<f2").reshape(inner, *shape)
    checksums = group["embedding_checksum"][:]
    for row in range(SHARD_ROWS, min(ROWS, SHARD_ROWS + inner)):
        stored = values[row - SHARD_ROWS]
        expected = value(f"caption {row}")[-len(stored) :]
        np.testing.assert_allclose(stored, expected, rtol=1e-3)
        assert google_crc32c.value(stored.tobytes()) == checksums[row]
    keys = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in captions(ROWS)]
    assert group["row_key"][:].tolist() == [int.from_bytes(key, "little") for key in keys]
    assert group["row_status"][:].tolist() == [1] * ROWS
    assert group["embedding"].metadata.dimension_names[0] == "row"

    manifest = json.loads((tmp_path / "store.manifest.json").read_text())
    tables = ["row_status", "row_key", *(f"{name}_checksum" for name in meta["spec"]["arrays"])]
    whole = hashlib.sha256(b"".join(group[name][:].tobytes() for name in tables))
    assert manifest["content"] == whole.hexdigest()
    first = hashlib.sha256(checksums[:SHARD_ROWS].tobytes()).hexdigest()
    assert manifest["shards"]["embedding"][0] == first[:8]
