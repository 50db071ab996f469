"""Tasks on a Dask cluster: the same results in the same order, and clear words when it fails."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import dask
import pytest
from dask_cluster import (
    DaskCluster,
    dask_cluster,
    make_deadly,
    make_gpu_name,
    make_lookup,
    make_refusal,
)
from distributed import LocalCluster

from cluster import (
    ScaleOutParams,
    TasksLostError,
    UnfitWorkerError,
    dask_scheduler,
    map_in_order,
    map_tasks,
)
from cluster.dask_scheduler import SchedulerUnreachableError, do_sealed, shared_gpus
from cluster.jobs import Job, do_task, visible_gpus

WORDS = [f"word{i}" for i in range(200)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    with dask_cluster(tmp_path_factory.mktemp("cluster"), workers=3) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run is started: not where the workers were."""
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text(" ".join(WORDS))
    return tmp_path


def by(scheduler: object, num_workers: int | None = None) -> ScaleOutParams:
    return ScaleOutParams(scheduler=str(scheduler), num_workers=num_workers)


@pytest.mark.parametrize("scheduler", ["single", "threads"])
def test_results_come_in_the_order_of_the_tasks(folder: Path, scheduler: str) -> None:
    make = partial(make_lookup, str(folder / "log"))
    found = list(map_in_order(make, range(200), by(scheduler, 3)))
    assert found == list(enumerate(WORDS))
    assert len((folder / "log").read_text().splitlines()) == 1


def test_a_cluster_reads_the_files_of_the_folder_where_the_run_was_started(
    folder: Path, running: DaskCluster
) -> None:
    make = partial(make_lookup, str(folder / "log"))
    found = list(map_in_order(make, range(200), by(running.scheduler_file)))
    assert found == list(enumerate(WORDS))
    # The model is loaded once per worker, not per task.
    made = (folder / "log").read_text().split()
    assert len(made) == len(set(made)) > 1


def test_an_error_of_a_worker_ends_the_run(folder: Path, running: DaskCluster) -> None:
    with pytest.raises(ValueError, match="no such model"):
        map_tasks(make_refusal, range(5), print, by(running.address))


def test_a_killed_worker_costs_its_task_only(folder: Path, running: DaskCluster) -> None:
    done: list[tuple[int, str]] = []

    def take(result: tuple[int, str]) -> None:
        done.append(result)
        if len(done) == 10:
            running.workers[0].kill()

    make = partial(make_lookup, str(folder / "log"), 0.02)
    map_tasks(make, range(60), take, by(running.address))
    assert running.workers[0].wait() == -9
    assert sorted(done) == list(enumerate(WORDS[:60]))  # each one, once


def test_a_scheduler_that_dies_is_told(folder: Path, running: DaskCluster) -> None:
    def take(_: object) -> None:
        running.scheduler.kill()

    make = partial(make_lookup, str(folder / "log"), 0.05)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "500ms"}),
        pytest.raises(SchedulerUnreachableError, match="went away. What is done stays done"),
    ):
        map_tasks(make, range(200), take, by(running.address))


def test_a_task_that_kills_every_worker_is_given_up_and_the_others_are_done(folder: Path) -> None:
    done: list[int] = []
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        pytest.raises(TasksLostError) as lost,
    ):
        map_tasks(make_deadly, range(8), done.append, by("local-cluster", 1))
    # Dask may blame a neighbour that waited at the same worker: the next run does that one.
    assert 3 not in done
    assert len(done) == len(set(done)) >= 6
    assert str(lost.value).startswith(f"{8 - len(done)} tasks are not done")


@pytest.mark.parametrize("by_what", [by("local-cluster"), by("processes", 2)], ids=str)
def test_each_local_worker_is_born_with_its_own_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, by_what: ScaleOutParams
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_gpus() == ["5", "7"]
    assert set(map_in_order(make_gpu_name, range(8), by_what)) == {"5", "7"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"


def test_workers_that_share_a_gpu_are_named() -> None:
    found = {
        "tcp://a:1": ("a", ("0", "1")),
        "tcp://a:2": ("a", ("0", "1")),
        "tcp://a:3": ("a", ("1",)),
        "tcp://b:1": ("b", ("0",)),
        "tcp://c:1": ("c", ()),
        "tcp://c:2": ("c", ()),
    }
    [told] = shared_gpus(found)
    assert told.startswith("2 workers on a share GPU 0")


def test_a_worker_that_is_unlike_the_coordinator_says_so(folder: Path) -> None:
    with pytest.raises(UnfitWorkerError, match="cannot enter /nowhere"):
        do_task(Job(make_deadly, folder="/nowhere"), 0)
    with pytest.raises(UnfitWorkerError, match=r"has numpy .*, the run was started with 0\.1"):
        do_task(Job(make_deadly, {"numpy": "0.1"}), 0)
    with pytest.raises(UnfitWorkerError, match="has nosuchthing none"):
        do_task(Job(make_deadly, {"nosuchthing": "1"}), 0)
    with pytest.raises(UnfitWorkerError, match="No module named 'nosuchmodule'"):
        do_sealed(b"cnosuchmodule\nwork\n.")
    assert os.getcwd() == str(folder)


def test_a_scheduler_that_is_not_there_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "200ms"}),
        pytest.raises(SchedulerUnreachableError, match="no Dask scheduler answers at tcp://"),
    ):
        map_tasks(make_deadly, [1], print, by("tcp://127.0.0.1:1"))
    monkeypatch.setattr(dask_scheduler, "FILE_WAIT", 0.1)
    with pytest.raises(SchedulerUnreachableError, match=r"no scheduler wrote missing\.json"):
        map_tasks(make_deadly, [1], print, by("missing.json"))
    monkeypatch.setattr(dask_scheduler, "WORKER_WAIT", 0.2)
    with (
        caplog.at_level(logging.WARNING, "cluster"),
        LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address=None) as empty,
        pytest.raises(SchedulerUnreachableError, match="no worker came to the scheduler at tcp://"),
    ):
        map_tasks(make_deadly, [1], print, by(empty.scheduler_address))
    assert "waiting up to 0 s for the first worker" in caplog.text


def test_a_scheduler_is_a_word_an_address_or_a_file() -> None:
    for good in ("single", "tls://10.0.0.1:8786", "shared/scheduler.json"):
        assert by(good).scheduler == good
    with pytest.raises(ValueError, match="'cluster' is no scheduler"):
        by("cluster")
