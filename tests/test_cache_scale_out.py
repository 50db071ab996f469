"""Shards on threads, processes and a cluster: the same bytes, whatever dies on the way."""

import os
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from dask_cluster import dask_cluster
from test_cache_samples import (
    PROVENANCE,
    captions,
    files,
    fill_sample,
    make_roles,
    make_spec,
    read,
)

from cache import FillingParams, Roles, fill, manifest_location
from cluster import ScaleOutParams, crew_for


@pytest.fixture(scope="module")
def rows() -> list[str]:
    rows = captions(45)
    rows[13] = "unreadable"
    return rows


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> Path:
    """The same in float16, which needs no fitting."""
    path = tmp_path_factory.mktemp("plain") / "s.zarr"
    fill_sample(path, rows)
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> Path:
    """The store that a single process makes."""
    path = tmp_path_factory.mktemp("single") / "s.zarr"
    fill_sample(path, rows, spec=SPEC)
    return path


SPEC = make_spec(dtype="int8", share_first=True)


def expect_same(path: Path, single: Path) -> None:
    assert files(path) == files(single)
    assert manifest_location(path).read_text() == manifest_location(single).read_text()


def encoded(log: Path) -> Counter[str]:
    """How often each row was encoded, over all processes."""
    return Counter(row for file in log.iterdir() for row in file.read_text().split("\n")[:-1])


def test_threads(tmp_path: Path, single: Path, rows: list[str]) -> None:
    told: list[tuple[int, ...]] = []
    report = fill_sample(
        tmp_path / "s.zarr",
        rows,
        spec=SPEC,
        scheduler="threads",
        num_workers=3,
        progress=lambda *counts: told.append(counts),
    )
    assert list(report.failed) == [13]
    assert len(told) == 6
    assert told[-1] == (45, 45, 1)
    expect_same(tmp_path / "s.zarr", single)


def dying_roles(folder: str) -> Roles:
    """Roles of which the first process to encode row 20 is killed."""
    roles = make_roles(log=folder)

    def encode(payloads: list[str]) -> object:
        mark = Path(folder).with_suffix(".died")
        if "caption 20" in payloads and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return roles.encode(payloads)

    return Roles(read, encode, constants=roles.constants)  # type: ignore[arg-type]


def test_processes_one_of_which_dies(tmp_path: Path, plain: Path, rows: list[str]) -> None:
    log = tmp_path / "log"
    log.mkdir()
    report = fill(
        tmp_path / "s.zarr",
        rows,
        make_spec(),
        partial(dying_roles, str(log)),
        provenance=PROVENANCE,
        params=FillingParams(batch_size=3),
        crew=crew_for(ScaleOutParams(scheduler="processes", num_workers=2), {}),
    )
    assert report.done == 44
    assert (tmp_path / "log.died").exists()
    expect_same(tmp_path / "s.zarr", plain)


def test_local_cluster(tmp_path: Path, single: Path, rows: list[str]) -> None:
    fill_sample(tmp_path / "s.zarr", rows, spec=SPEC, scheduler="local-cluster", num_workers=1)
    expect_same(tmp_path / "s.zarr", single)


def test_a_running_scheduler_of_which_a_worker_is_killed(
    tmp_path: Path, plain: Path, rows: list[str]
) -> None:
    log = tmp_path / "log"
    log.mkdir()
    told: list[int] = []
    with dask_cluster(tmp_path, workers=2) as cluster:

        def kill_one(settled: int, total: int, failed: int) -> None:
            told.append(settled)
            if len({file.name for file in log.iterdir()}) == 2 and len(told) < 5:
                cluster.workers[1].kill()

        report = fill_sample(
            tmp_path / "s.zarr",
            rows,
            seconds=0.1,
            log=log,
            scheduler=cluster.address,
            progress=kill_one,
        )
    assert cluster.workers[1].returncode == -signal.SIGKILL
    assert (report.done, list(report.failed)) == (44, [13])
    expect_same(tmp_path / "s.zarr", plain)
    # The shard in work is lost, and at most one whose result was on its way.
    again = {rows.index(row) // 8 for row, count in encoded(log).items() if count > 1}
    assert len(again) <= 2
