"""What lies in a work folder, who still names it, and deleting what nobody does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workfolder.entries import ASIDE, Entry, WorkFolder

_MD5 = re.compile(r"\bmd5: ([0-9a-f]{32})\b")


@dataclass(frozen=True)
class EntryState:
    """One entry as `stages work` shows it."""

    entry: Entry | None
    """None for what was put aside."""
    folder: Path
    size: int
    """Bytes that no other entry shares (hard links count once, for the newest)."""
    age: float
    """Seconds since it was last written."""
    state: str
    """`finished`, `unfinished`, `aside`, or `in work`: a process makes it now."""
    used_by: tuple[str, ...]
    """Workspaces, and commits or experiments whose dvc.lock names an output of it."""


def list_entries(work: WorkFolder) -> list[EntryState]:
    """Everything in the folder, newest first."""
    workspaces = _workspaces(work)
    hashes = _recorded_hashes([path for path, _ in workspaces])
    by_folder = {entry.folder: entry for entry in work.entries()}
    folders = [p for p in work.root.glob("*/*") if p.is_dir() and p.parent.name not in _OWN]
    # Newest first: shared bytes are counted for the entry that was made last.
    folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    seen: set[tuple[int, int]] = set()
    found = []
    for folder in folders:
        size, newest = _measure(folder, seen)
        entry = by_folder.get(folder)
        users: list[str] = []
        state = "aside" if ASIDE in folder.name else "unfinished"
        if entry is not None and state != "aside":
            users += [str(path) for path, names in workspaces if entry.name in names]
            finished = entry.finished
            if finished is not None:
                state = "finished"
                named = {hashes[h] for h in finished["outputs"].values() if h in hashes}
                users += sorted(named - {*users})
            elif entry.is_held():
                state = "in work"
        found.append(EntryState(entry, folder, size, time.time() - newest, state, tuple(users)))
    return found


def prune(states: Sequence[EntryState]) -> list[str]:
    """Delete what `is_free`. The URLs of stores that were recorded there and lie elsewhere, where
    they stay: others may read them."""
    left = []
    for state in states:
        if is_free(state):
            if state.entry is not None and (finished := state.entry.finished) is not None:
                left += [url for key, url in finished["summary"].items() if key == "store"]
            shutil.rmtree(state.folder)
    return left


def is_free(state: EntryState) -> bool:
    """Whether no workspace, commit or experiment names it, and no process makes it now."""
    return not state.used_by and state.state != "in work"


# Not entries: who makes and uses what, and backbones that `--retrain` made, in an hour or two.
_OWN = ("locks", "uses", "backbones")


def _workspaces(work: WorkFolder) -> list[tuple[Path, set[str]]]:
    """Workspaces that still exist, with the names of the entries that they used last."""
    found = []
    for file in sorted((work.root / "uses").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        # A workspace that was deleted keeps nothing.
        if Path(content["workspace"]).is_dir():
            found.append((Path(content["workspace"]), set(content["entries"].values())))
    return found


def _recorded_hashes(workspaces: Sequence[Path]) -> dict[str, str]:
    """MD5 of an output -> the commit or experiment whose dvc.lock names it."""
    found: dict[str, str] = {}
    for workspace in workspaces:
        lock = workspace / "dvc.lock"
        if lock.is_file():
            _add_hashes(found, lock.read_text(encoding="utf-8"), str(workspace), workspace)
        refs = _git(
            workspace, "for-each-ref", "--format=%(objectname) %(refname:short)", "refs/exps"
        )
        names = dict(line.split(" ", 1) for line in refs.splitlines() if " " in line)
        # Every commit that changed dvc.lock, on any branch, and every experiment: what one of them
        # names can be checked out again without computing.
        commits = _git(workspace, "log", "--all", "--format=%H", "--", "dvc.lock").split()
        for commit in dict.fromkeys([*names, *commits]):
            text = _git(workspace, "show", f"{commit}:./dvc.lock")
            name = names.get(commit, commit[:10]).rsplit("/", 1)[-1]
            _add_hashes(found, text, name, workspace)
    return found


def _add_hashes(found: dict[str, str], lock: str, name: str, workspace: Path) -> None:
    """The files that a dvc.lock names, those within its folders too."""
    for md5 in _MD5.findall(lock):
        found.setdefault(md5, name)
    for md5 in re.findall(r"\bmd5: ([0-9a-f]{32})\.dir\b", lock):
        # Of a folder dvc.lock names one hash; the files' own are in the listing behind it.
        listing = workspace / ".dvc/cache/files/md5" / md5[:2] / f"{md5[2:]}.dir"
        if listing.is_file():
            for row in json.loads(listing.read_text(encoding="utf-8")):
                found.setdefault(row["md5"], name)


def _git(workspace: Path, *words: str) -> str:
    """What git prints; nothing where there is no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(workspace), *words], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _measure(folder: Path, seen: set[tuple[int, int]]) -> tuple[int, float]:
    """Bytes of files not seen before, and the newest time of change."""
    size, newest = 0, folder.stat().st_mtime
    for parent, _, names in os.walk(folder):
        for name in names:
            status = os.stat(os.path.join(parent, name), follow_symlinks=False)
            newest = max(newest, status.st_mtime)
            # One file under several names, as `place` and shared shards make them.
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                size += status.st_size
    return size, newest
