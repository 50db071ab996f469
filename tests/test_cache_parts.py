"""Machines without a common disk: each fills its shards, one joins them to what one would make."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from test_cache_samples import captions, files, fill_sample, make_spec

from cache import (
    DamagedRowsError,
    Part,
    PartsError,
    StoreMismatchError,
    join_stores,
    manifest_location,
    read_manifest,
    verify,
)
from gill_errors import InputError

ROWS = captions(45)  # six shards, the last of five rows
ROWS[13] = "unreadable"
SPEC = make_spec(dtype="int8", share_first=True, compressor="blosc-zstd")

MACHINE = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import test_cache_parts as here
import test_cache_samples as samples
from cache import Part, fill, join_stores

def die_after(count):
    def told(settled, total, *_):
        if settled >= count: os.kill(os.getpid(), signal.SIGKILL)
    return told if count else None

{what}
"""


def machine(folder: Path, what: str) -> int:
    """Run Python in a process and a folder of its own, as another machine would; its exit code."""
    folder.mkdir(exist_ok=True)
    code = MACHINE.format(tests=str(Path(__file__).parent), what=what)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment).returncode


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A store in three parts, float16."""
    folder = tmp_path_factory.mktemp("parts")
    for number in (1, 2, 3):
        where = {"scheduler": "threads", "num_workers": 2} if number == 2 else {}
        report = fill_sample(folder / f"{number}.zarr", ROWS, part=Part(number, 3), **where)
        assert (report.num_rows, report.encoded) == [(16, 16), (16, 16), (13, 13)][number - 1]
        assert list(report.failed) == ([13] if number == 1 else [])
        assert not manifest_location(folder / f"{number}.zarr").exists()
    return [folder / f"{number}.zarr" for number in (1, 2, 3)]


def expect_same(path: Path, single: Path) -> None:
    assert files(path) == files(single)
    assert manifest_location(path).read_text() == manifest_location(single).read_text()


def test_killed_and_resumed_on_two_machines_it_is_what_one_makes(tmp_path: Path) -> None:
    fill_sample(tmp_path / "single.zarr", ROWS, spec=SPEC)
    fill = (
        "samples.fill_sample('part.zarr', here.ROWS, spec=here.SPEC, "
        "part=Part({}, 2), progress=die_after({}))"
    )
    assert machine(tmp_path / "a", fill.format(1, 8)) == -signal.SIGKILL
    assert machine(tmp_path / "b", fill.format(2, 0)) == 0
    both = [tmp_path / "a" / "part.zarr", tmp_path / "b" / "part.zarr"]
    with pytest.raises(PartsError, match=r"shard [12] \(rows \d+ to \d+\)"):
        join_stores(both, tmp_path / "joined.zarr")
    assert not (tmp_path / "joined.zarr").exists()
    fill_sample(both[0], ROWS, spec=SPEC, part=Part(1, 2))  # goes on where it was killed
    join = f"join_stores({[str(path) for path in both]}, 'joined.zarr', die_after(2))"
    assert machine(tmp_path, join) == -signal.SIGKILL
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "joined.zarr")
    join_stores(both, tmp_path / "joined.zarr")
    expect_same(tmp_path / "joined.zarr", tmp_path / "single.zarr")
    assert fill_sample(tmp_path / "joined.zarr", ROWS, spec=SPEC).encoded == 0


def test_by_way_of_an_object_store(tmp_path: Path, parts: list[Path]) -> None:
    bucket = f"memory://{uuid.uuid4().hex}"
    fill_sample(f"{bucket}/2.zarr", ROWS, part=Part(2, 3))
    join_stores([parts[0], f"{bucket}/2.zarr", parts[2]], f"{bucket}/joined.zarr")
    join_stores([f"{bucket}/joined.zarr"], tmp_path / "joined.zarr")
    fill_sample(tmp_path / "single.zarr", ROWS)
    expect_same(tmp_path / "joined.zarr", tmp_path / "single.zarr")
    assert verify(f"{bucket}/joined.zarr").ok


def test_what_makes_no_store_is_named_and_nothing_written(
    tmp_path: Path, parts: list[Path]
) -> None:
    one, two, three = parts

    def refuse(message: str, *given: Path) -> None:
        with pytest.raises(PartsError, match=message) as refusal:
            join_stores(given, tmp_path / "joined.zarr")
        assert "\n" not in str(refusal.value)
        assert not list(tmp_path.glob("joined*"))

    refuse(r"no part has shard 2 \(rows 16 to 23\)", one, three)
    copy = shutil.copytree(two, tmp_path / "copy.zarr")
    refuse(rf"shard 2 \(rows 16 to 23\) is in both {two} and {copy}: leave one out", *parts, copy)
    other = tmp_path / "other.zarr"
    fill_sample(other, [*ROWS[:40], "else", *ROWS[41:]], part=Part(3, 3))
    refuse("their rows differ from row 40 on", one, two, other)
    fill_sample(other, ROWS, spec=make_spec(dtype="float32"), part=Part(3, 3), rebuild=True)
    refuse("dtype is 'float16' and 'float32'", one, two, other)
    provenance = {"model": "another"}
    fill_sample(other, ROWS, provenance=provenance, part=Part(3, 3), rebuild=True)
    refuse("model is 'hash' and 'another'", one, two, other)
    with pytest.raises(PartsError, match="onto itself"):
        join_stores(parts, one)
    for text in ("0/3", "4/3", "3", "a/b"):
        with pytest.raises(InputError, match="is no part: write 3/8"):
            Part.parse(text)
    assert Part.parse("2/3").shards(6) == range(2, 4)


def test_a_damaged_shard_is_named_and_does_not_count(tmp_path: Path, parts: list[Path]) -> None:
    two = shutil.copytree(parts[1], tmp_path / "2.zarr")
    shard = two / "embedding" / "c" / "3" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    joined = tmp_path / "joined.zarr"
    with pytest.raises(DamagedRowsError, match=rf"{shard} \(shard 3\): row 24: checksum differs"):
        join_stores([parts[0], two, parts[2]], joined)
    assert not (joined / "embedding" / "c" / "3").exists()
    join_stores(parts, joined)  # with a sound copy it goes on
    fill_sample(tmp_path / "single.zarr", ROWS)
    expect_same(joined, tmp_path / "single.zarr")


def test_what_lies_at_the_target_stays(tmp_path: Path, parts: list[Path]) -> None:
    there = tmp_path / "there.zarr"
    fill_sample(there, captions(20))
    before = files(there)
    with pytest.raises(StoreMismatchError, match="holds other rows"):
        join_stores(parts, there)
    assert files(there) == before
