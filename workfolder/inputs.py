"""Links to the files of the user's that params.yaml names, so that DVC sees when they change.

DVC can only watch paths that dvc.yaml names, and those must exist before a stage runs; what a
params file names may be a table, a folder, a pattern, a hub id or nothing. So every stage that
reads such files has a folder `inputs/STAGE` as a dependency, which holds links to them: DVC hashes
what a link to a file leads to.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from workfolder.entries import make_link, repository_of

MOST_FILES = 50_000
"""More files in one folder are not watched: DVC would take minutes at every command."""


def watch_files(folder: Path, named: Mapping[str, str | Path | None]) -> list[str]:
    """Make `folder` hold links to exactly the files behind `named` (name -> file or folder).

    What is None or does not exist is left out. Gives a line for every folder too large to be
    watched. Raises WorkFolderError where there are no links.
    """
    links: dict[Path, Path] = {}
    notes = []
    for name, path in named.items():
        if path is None or not Path(path).exists():
            continue
        source = Path(path).resolve()
        files = [source] if source.is_file() else _files_below(source)
        if files is None:
            notes.append(
                f"{path} has more than {MOST_FILES:,} files: DVC does not watch it. After changing "
                "files in it, run the stage again (dvc repro --force --single-item STAGE)"
            )
            continue
        for file in files:
            place = name if source.is_file() else f"{name}/{file.relative_to(source).as_posix()}"
            links[folder / place] = file
    _make_links(folder, links)
    return notes


def bring_from_repository(named: Iterable[str | None]) -> None:
    """In DVC's copy of the repository for an experiment, link to files that git does not carry.

    A relative path that is not here, but in the repository itself, is linked at its first missing
    part, so that it means the same in both.
    """
    here = Path.cwd()
    repository = repository_of(here.resolve())
    for path in map(Path, filter(None, named)):
        if repository == here.resolve() or path.is_absolute() or path.exists():
            continue
        for depth in range(1, len(path.parts) + 1):
            part = Path(*path.parts[:depth])
            if not part.exists() and (repository / part).exists():
                part.symlink_to(repository / part)
                break


def signature(folder: Path) -> str:
    """A fingerprint of the files behind the links in `folder`, by name, size and time of change."""
    total = hashlib.sha256()
    for link in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        status = link.stat()
        total.update(f"{link.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return total.hexdigest()


def _files_below(folder: Path) -> list[Path] | None:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [n for n in folders if not n.startswith((".", "__pycache__"))]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
        if len(found) > MOST_FILES:
            return None
    return found


def _make_links(folder: Path, links: Mapping[Path, Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.rglob("*"), reverse=True):
        if old.is_symlink() and (old not in links or Path(os.readlink(old)) != links[old]):
            old.unlink()
        elif old.is_dir() and not old.is_symlink() and not any(old.iterdir()):
            old.rmdir()
    for place, source in links.items():
        if not place.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            make_link(place, source)
