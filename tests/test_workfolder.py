"""The work folder: entries by what decides them, links, watching, who uses what."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gill_errors import WriteFailedError
from workfolder import (
    WorkFolder,
    WorkFolderError,
    bring_from_repository,
    content_of,
    file_md5,
    list_entries,
    place,
    place_link,
    prune,
    signature,
    watch_files,
)


def finished_entry(work: WorkFolder, kind: str = "training", **decided_by: object):
    entry = work.entry(kind, decided_by)
    entry.begin()
    (entry.folder / "heads").write_text(json.dumps(decided_by, sort_keys=True))
    entry.finish(["heads"], 1.0)
    return entry


def test_an_entry_is_known_by_everything_that_decides_it(tmp_path: Path) -> None:
    work = WorkFolder.open(str(tmp_path / "w"), tmp_path)
    entry = finished_entry(work, r=4, rows={"a": [1, 2]})
    assert work.entry("training", {"rows": {"a": (1, 2)}, "r": 4}).folder == entry.folder
    assert work.entry("training", {"rows": {"a": [1, 3]}, "r": 4}).finished is None
    found = work.with_output("training", "heads", file_md5(entry.folder / "heads"))
    assert found is not None
    assert found.name == entry.name
    assert work.with_output("training", "heads", "0" * 32) is None
    other = work.entry("training", {"r": 8, "rows": {"a": [1, 2]}})
    work.note_use("train", entry)
    assert str(entry.folder) in other.explain_absence("train")
    assert "r 4 -> 8" in other.explain_absence("train")


def test_what_is_put_aside_keeps_its_files(tmp_path: Path) -> None:
    work = WorkFolder.open(str(tmp_path / "w"), tmp_path)
    entry = finished_entry(work, r=1)
    first, _ = entry.put_aside(), finished_entry(work, r=1)
    second = entry.put_aside()
    assert (first.name, second.name) == (f"{entry.key}.aside-1", f"{entry.key}.aside-2")
    assert (first / "heads").read_text() == '{"r": 1}'
    assert entry.finished is None


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "format.json").write_text('{"format": 9}')
    with pytest.raises(WorkFolderError, match="is of format 9, this version reads 1"):
        WorkFolder.open("w", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkFolderError, match="cannot be written"):
        WorkFolder.open("file/inside", tmp_path)


def test_the_variable_goes_before_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GILL_WORK", str(tmp_path / "shared"))
    assert WorkFolder.open("other", tmp_path).root == tmp_path / "shared"


def test_an_experiment_of_dvc_uses_the_repositorys_folder(tmp_path: Path) -> None:
    copy = tmp_path / "repo" / ".dvc" / "tmp" / "exps" / "tmpab12"
    copy.mkdir(parents=True)
    assert WorkFolder.open(None, copy).root == tmp_path / "repo" / "work"
    assert WorkFolder.open("here", copy).root == tmp_path / "repo" / "here"


def _hold(root: str, workspace: str, seconds: float) -> None:
    with WorkFolder.open(root, Path(workspace)).entry("features", {"a": 1}).alone():
        Path(root, "held").touch()
        time.sleep(seconds)
        Path(root, "let go").touch()


def test_the_second_waits_and_says_for_whom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, first = tmp_path / "w", tmp_path / "first"
    first.mkdir()
    process = multiprocessing.get_context("spawn").Process(
        target=_hold, args=(str(root), str(first), 1.0)
    )
    process.start()
    while not (root / "held").exists():
        time.sleep(0.02)
    entry = WorkFolder.open(str(root), tmp_path).entry("features", {"a": 1})
    assert entry.is_held()
    with entry.alone():
        assert (root / "let go").exists()
    process.join()
    said = capsys.readouterr().out
    assert f"waiting for process {process.pid} on" in said
    assert f"which makes the same for {first}" in said
    assert not entry.is_held()


def test_large_files_share_bytes_and_are_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "made" / "in").mkdir(parents=True)
    (tmp_path / "made" / "in" / "a").write_text("1")
    (tmp_path / "made" / "weights").write_bytes(bytes(2**20))
    place(tmp_path / "made", tmp_path / "art" / "x")
    assert (tmp_path / "art/x/weights").stat().st_ino == (tmp_path / "made/weights").stat().st_ino
    (tmp_path / "made2").write_text("2")
    place(tmp_path / "made2", tmp_path / "art" / "x")
    assert (tmp_path / "art" / "x").read_text() == "2"
    assert (tmp_path / "made" / "in" / "a").read_text() == "1"


def test_what_is_finished_does_not_change_with_a_small_file_that_is_written_into(
    tmp_path: Path,
) -> None:
    # As DVC does with files of git when it applies an experiment.
    (tmp_path / "made.json").write_text("1")
    place(tmp_path / "made.json", tmp_path / "metrics" / "made.json")
    with (tmp_path / "metrics" / "made.json").open("r+") as stream:
        stream.write("2")
    assert (tmp_path / "made.json").read_text() == "1"


def test_files_are_copied_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(bytes(2**20))
    place(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == bytes(2**20)
    assert content_of(tmp_path / "b") == {"": "b6d81b360a5672d80c27430f39153e2c"}


def test_a_link_never_replaces_what_is_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "store").mkdir()
    with pytest.raises(WorkFolderError, match="real is not a link"):
        place_link(tmp_path / "store", tmp_path / "real")
    place_link(tmp_path / "real", tmp_path / "link")
    place_link(tmp_path / "store", tmp_path / "link")
    assert (tmp_path / "link").resolve() == tmp_path / "store"

    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(WorkFolderError, match="file system without symbolic links"):
        place_link(tmp_path / "real", tmp_path / "link")
    assert (tmp_path / "link").resolve() == tmp_path / "store"


def test_a_half_made_link_of_a_killed_process_goes_and_that_of_a_living_one_stays(
    tmp_path: Path,
) -> None:
    (tmp_path / "store").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / f".a.zarr.{process}.link" for process in (dead.pid, os.getppid())]
    for link in left:
        link.symlink_to(tmp_path / "store")
    place_link(tmp_path / "store", tmp_path / "a.zarr")
    assert [link.is_symlink() for link in left] == [False, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == [left[1].name, "a.zarr", "store"]


def test_watched_files_are_exactly_those_that_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "unet" / "weights").write_text("w")
    (model / "__pycache__").mkdir()
    (model / "__pycache__" / "x.pyc").write_text("")
    (tmp_path / "table.tsv").write_text("t")
    folder = tmp_path / "inputs"
    named = {"model": model, "table": tmp_path / "table.tsv", "none": None, "absent": "nowhere"}
    assert watch_files(folder, named) == []
    links = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink()}
    assert links == {"model/unet/weights", "table"}
    before = signature(folder)
    os.utime(model / "unet" / "weights", ns=(1, 1))
    assert signature(folder) != before
    watch_files(folder, {"table": tmp_path / "table.tsv"})
    assert sorted(p.name for p in folder.rglob("*")) == ["table"]


def test_a_folder_too_large_to_watch_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workfolder.inputs.MOST_FILES", 3)
    (tmp_path / "many").mkdir()
    for i in range(4):
        (tmp_path / "many" / str(i)).touch()
    [note] = watch_files(tmp_path / "inputs", {"many": tmp_path / "many"})
    assert "has more than 3 files: DVC does not watch it" in note
    assert not list((tmp_path / "inputs").iterdir())


def test_a_copy_for_an_experiment_sees_files_that_git_does_not_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repo"
    (repository / "data" / "in").mkdir(parents=True)
    (repository / "data" / "in" / "t.tsv").write_text("t")
    copy = repository / ".dvc" / "tmp" / "exps" / "tmpx"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    bring_from_repository(["data/in/t.tsv", None, "miniature", "/absolute"])
    assert Path("data").is_symlink()
    assert Path("data/in/t.tsv").read_text() == "t"
    assert not Path("miniature").exists()


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_what_a_commit_names_is_kept(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    workspace.mkdir()
    work = WorkFolder.open(str(tmp_path / "w"), workspace)
    committed, used, nobodys = (finished_entry(work, r=r) for r in (1, 2, 3))
    work.note_use("train", committed)
    git(workspace, "init", "-q")
    md5 = file_md5(committed.folder / "heads")
    (workspace / "dvc.lock").write_text(f"  - path: artifacts/model/heads\n    md5: {md5}\n")
    git(workspace, "add", "dvc.lock")
    git(workspace, "commit", "-qm", "one")
    (workspace / "dvc.lock").unlink()
    work.note_use("train", used)
    states = {state.entry.key: state for state in list_entries(work) if state.entry}
    assert states[used.key].used_by == (str(workspace),)
    assert len(states[committed.key].used_by) == 1
    assert states[nobodys.key].used_by == ()
    prune(list(states.values()))
    assert committed.finished
    assert used.finished
    assert not nobodys.folder.exists()


def test_what_is_made_now_and_retrained_backbones_are_never_pruned(tmp_path: Path) -> None:
    work = WorkFolder.open(str(tmp_path / "w"), tmp_path)
    making = work.entry("features", {"rows": 1})
    making.begin()
    trained = work.root / "backbones" / "language_model"
    trained.mkdir(parents=True)
    with making.alone():
        [state] = list_entries(work)
        assert (state.state, state.used_by) == ("in work", ())
        prune([state])
        assert making.begun
    [state] = list_entries(work)
    assert state.state == "unfinished"
    prune([state])
    assert not making.folder.exists()
    assert trained.is_dir()


def test_a_store_elsewhere_stays_and_is_named(tmp_path: Path) -> None:
    work = WorkFolder.open(str(tmp_path / "w"), tmp_path)
    here, there = (work.entry("features", {"rows": n}) for n in (1, 2))
    for entry, summary in ((here, {}), (there, {"store": "s3://a/features.zarr"})):
        entry.begin()
        entry.finish([], 1.0, **summary)
    assert prune(list_entries(work)) == ["s3://a/features.zarr"]
    assert list_entries(work) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WorkFolder.open(str(tmp_path / "w"), tmp_path)
    entry = finished_entry(work, r=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        WriteFailedError, match=r"decided_by.json cannot be written \(No space left"
    ):
        work.entry("training", {"r": 2}).begin()
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(WriteFailedError, match=r"x cannot be written \(No space left"):
        place(entry.folder / "heads", tmp_path / "art" / "x")
    assert entry.finished


def test_a_workspace_that_is_gone_keeps_nothing(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    workspace.mkdir()
    work = WorkFolder.open(str(tmp_path / "w"), workspace)
    entry = finished_entry(work, r=1)
    work.note_use("train", entry)
    assert [s.used_by for s in list_entries(work)] == [(str(workspace),)]
    workspace.rmdir()
    assert [s.used_by for s in list_entries(work)] == [()]
