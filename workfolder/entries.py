"""The work folder and its entries."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from gill_errors import GillError, WriteFailedError
from gill_files import explained, hash_of, link_or_copy, remove_partial_files, written_whole
from gill_records import differences

FORMAT = 1
VARIABLE = "GILL_WORK"
ASIDE = ".aside-"
"""In the names of folders that were put aside."""
_TEMPORARY = Path(".dvc/tmp/exps")
_LARGE_FILE = 2**20  # bytes
"""Where DVC lays the workspace of an experiment with --temp or --queue, below the repository."""


class WorkFolderError(GillError):
    """The work folder cannot be used; the message says why and what to do."""


class WorkFolder:
    """One work folder, as seen from one workspace (the folder with params.yaml)."""

    def __init__(self, root: Path, workspace: Path | None = None) -> None:
        self.root, self.workspace = root, (workspace or Path.cwd()).resolve()

    @classmethod
    def open(cls, named: str | None, workspace: Path | None = None) -> WorkFolder:
        """The folder that $GILL_WORK or else `run.work` names; else `work/` of the repository.

        DVC runs queued experiments in a copy of the repository below its `.dvc/tmp/exps`; there the
        default, and a relative name, is the repository's own folder.

        Raises WorkFolderError where it cannot be written or was made by another version.
        """
        here = (workspace or Path.cwd()).resolve()
        root = repository_of(here) / (os.environ.get(VARIABLE) or named or "work")
        marker = root / "format.json"
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))["format"]
        except (FileNotFoundError, NotADirectoryError):
            found = FORMAT
            try:
                # Also the proof that something can be written here, before hours of work.
                write_json(marker, {"format": FORMAT})
            except WriteFailedError as error:
                raise WorkFolderError(
                    f"the work folder: {error}; or name another by run.work or {VARIABLE}"
                ) from None
        except (ValueError, KeyError, TypeError):
            found = "an unknown version"
        if found != FORMAT:
            raise WorkFolderError(
                f"the work folder {root} is of format {found}, this version reads {FORMAT}: name "
                f"another by run.work or {VARIABLE}"
            )
        return cls(root, here)

    def entry(self, kind: str, decided_by: Mapping[str, Any]) -> Entry:
        """The entry of exactly these inputs, whether or not anything is there yet."""
        # As it will be read back from decided_by.json, so that the key is that of the file.
        content = json.loads(json.dumps(decided_by))
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return Entry(self, kind, key, content)

    def entries(self, kind: str | None = None) -> Iterator[Entry]:
        """All that lie here, newest first; not those that were put aside."""
        found = []
        for record in self.root.glob(f"{kind or '*'}/*/decided_by.json"):
            folder = record.parent
            if ASIDE in folder.name:
                continue
            try:
                content = json.loads(record.read_text(encoding="utf-8"))
                found.append((record.stat().st_mtime, folder, content))
            except (OSError, ValueError):
                continue  # removed or written at this moment
        for _, folder, content in sorted(found, key=lambda row: row[0], reverse=True):
            yield Entry(self, folder.parent.name, folder.name, content)

    def with_output(self, kind: str, name: str, md5: str) -> Entry | None:
        """The finished entry whose output `name` has these bytes."""
        for entry in self.entries(kind):
            finished = entry.finished
            if finished and finished["outputs"].get(name) == md5:
                return entry
        return None

    # Which workspace uses what

    @property
    def _uses(self) -> Path:
        name = hashlib.sha256(str(self.workspace).encode()).hexdigest()[:16]
        return self.root / "uses" / f"{name}.json"

    def used(self) -> dict[str, str]:
        """Stage -> KIND/KEY that this workspace used last."""
        return read_json(self._uses, {"entries": {}})["entries"]

    def note_use(self, stage: str, entry: Entry | None) -> None:
        """Remember that this workspace uses the entry for a stage; None: no longer any."""
        self._uses.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._uses.with_suffix(".lock")):  # stages of one workspace side by side
            entries = self.used()
            if entry is None:
                entries.pop(stage, None)
            else:
                entries[stage] = entry.name
            write_json(self._uses, {"workspace": str(self.workspace), "entries": entries})


@dataclass(frozen=True)
class Entry:
    """One thing that is expensive to make."""

    work: WorkFolder
    kind: str
    key: str
    decided_by: dict[str, Any]

    @property
    def name(self) -> str:
        """KIND/KEY."""
        return f"{self.kind}/{self.key}"

    @property
    def folder(self) -> Path:
        """Where it is made and kept."""
        return self.work.root / self.kind / self.key

    @property
    def finished(self) -> dict[str, Any] | None:
        """outputs (name -> MD5), summary, seconds; None while it is not finished."""
        return read_json(self.folder / "finished.json", None)

    @property
    def begun(self) -> bool:
        """Whether anything of it is there."""
        return (self.folder / "decided_by.json").is_file()

    def begin(self) -> None:
        """Make its folder, with what decides it; what a killed run left half-written goes."""
        remove_partial_files(self.folder)
        write_json(self.folder / "decided_by.json", self.decided_by)

    def finish(self, outputs: Iterable[str], seconds: float, **summary: Any) -> None:
        """Record that `outputs` (files or folders in it) are whole; always the last step."""
        # By the hashes that DVC writes into dvc.lock, so that an entry is found by them.
        hashes: dict[str, str] = {}
        for name in outputs:
            found = content_of(self.folder / name)
            hashes |= {f"{name}/{inside}" if inside else name: h for inside, h in found.items()}
        write_json(
            self.folder / "finished.json",
            {"outputs": hashes, "seconds": round(seconds, 1), "summary": summary},
        )

    def make_once(self, outputs: Iterable[str], make: Callable[[], object]) -> bool:
        """Have the entry finished, by whichever process is first; gives whether it was before.

        `make` leaves `outputs` in the folder.
        """
        with self.alone():
            # Asked with the lock: another process may have finished it while this one waited.
            if self.finished is not None:
                return True
            self.begin()
            began = time.monotonic()
            make()
            self.finish(outputs, time.monotonic() - began)
            return False

    def provide(self, stage: str, places: Mapping[str, Path], make: Callable[[], object]) -> None:
        """Have outputs (name in the folder -> its place) made once and put there, for a stage."""
        if self.make_once(places, make):
            print(f"nothing to do: made before, in {self.folder}")
        for name, target in places.items():
            place(self.folder / name, target)
        self.work.note_use(stage, self)

    def put_aside(self) -> Path:
        """Rename what is there, so that it can be made anew; gives its new place."""
        number = 1
        # A new name every time: what was put aside before stays too.
        while (aside := self.folder.with_name(f"{self.key}{ASIDE}{number}")).exists():
            number += 1
        self.folder.rename(aside)
        return aside

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process makes this entry, saying for whom; then be the one."""
        lock = self._lock
        lock.parent.mkdir(parents=True, exist_ok=True)
        # Beside the lock: who waits can read it, and a dead holder's is overwritten.
        holder = lock.with_suffix(".json")
        held = FileLock(lock)
        try:
            # First without waiting, only to be able to say for whom it waits.
            held.acquire(timeout=0)
        except Timeout:
            other = read_json(holder, {"pid": "?", "host": "?", "workspace": "?"})
            print(
                f"{self.kind}: waiting for process {other['pid']} on {other['host']}, which makes "
                f"the same for {other['workspace']}",
                flush=True,
            )
            held.acquire()
        try:
            write_json(
                holder,
                {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "workspace": str(self.work.workspace),
                    "since": time.time(),
                },
            )
            yield
        finally:
            holder.unlink(missing_ok=True)
            held.release()

    def is_held(self) -> bool:
        """Whether a process makes this entry now."""
        held = FileLock(self._lock)
        try:
            # Tried, as the file tells nothing: a dead process leaves it behind.
            held.acquire(timeout=0)
        except Timeout:
            return True
        held.release()
        return False

    @property
    def _lock(self) -> Path:
        return self.work.root / "locks" / f"{self.kind}-{self.key}.lock"

    def differences(self, other: Entry) -> list[str]:
        """`key: theirs -> ours` wherever another entry was decided by something else."""
        return [
            f"{key} {_short(theirs)} -> {_short(ours)}"
            for key, theirs, ours in differences(other.decided_by, self.decided_by)
        ]

    def explain_absence(self, stage: str) -> str:
        """Why nothing finished can be taken: what differs from what this workspace used last."""
        last = self.work.used().get(stage, "")
        before = next((e for e in self.work.entries(self.kind) if e.name == last), None)
        if before is None or before.key == self.key:
            return ""
        what = "; ".join(self.differences(before)[:6]) or "nothing that is recorded"
        return f"the one used before stays in {before.folder}; changed since: {what}"


def repository_of(workspace: Path) -> Path:
    """The folder itself, or the repository whose temporary copy for an experiment it is."""
    for parent in workspace.parents:
        # `.dvc/tmp/exps` in the repository: three levels below it.
        if parent.parts[-3:] == _TEMPORARY.parts:
            return parent.parents[2]
    return workspace


def place(source: Path, target: Path) -> None:
    """Put a finished file or folder at `target`, replacing what is there.

    Small files are copied: git and editors write into a file as it is, and what is finished must
    not change with it. Large ones, which DVC replaces whole, share their bytes by a hard link where
    the file system has them.
    """
    with explained(target):
        remove(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Killed here, the target is missing: DVC asks the stage again, which only places.
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_put_file)
        else:
            _put_file(source, target)


def _put_file(source: str | Path, target: str | Path) -> None:
    is_large = os.path.getsize(source) >= _LARGE_FILE
    (link_or_copy if is_large else shutil.copy2)(source, target)


def place_link(source: str | Path, target: Path) -> None:
    """Make `target` a symbolic link to `source`, a path or (as text) a URL, in one step.

    Raises WorkFolderError where something that is no link lies there, or there are no links.
    """
    if target.exists() and not target.is_symlink():
        raise WorkFolderError(
            f"{target} is not a link into the work folder, and is left as it is: move it away"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # A link cannot be overwritten, but another can be renamed over it: there is always one. Every
    # process of torchrun may make it, so that each has a name of its own; those of killed ones go.
    for left in target.parent.glob(f".{target.name}.*.link"):
        owner = left.name.split(".")[-2]
        if owner == str(os.getpid()) or not psutil.pid_exists(int(owner)):
            left.unlink(missing_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.link")
    make_link(part, source.resolve() if isinstance(source, Path) else source)
    os.replace(part, target)


def make_link(place: Path, source: str | Path) -> None:
    """Make `place` a symbolic link. Raises WorkFolderError where there are none."""
    try:
        place.symlink_to(source)
    except OSError as error:
        raise WorkFolderError(
            f"{place.parent} lies on a file system without symbolic links ({error.strerror}): put "
            "the workspace on another"
        ) from None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_md5(path: Path) -> str:
    """MD5 in hex, as DVC writes it in dvc.lock."""
    return hash_of(path, "md5")


def content_of(path: Path) -> dict[str, str]:
    """MD5 of a file (under the empty name), or of every file in a folder by its name there."""
    if not path.is_dir():
        return {"": file_md5(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file_md5(file) for file in files}


def read_json(path: Path, otherwise: Any) -> Any:
    """The content of a JSON file, or something else where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return otherwise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    with explained(path), written_whole(path) as part:
        part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
