"""Commands work and accept: what lies in the work folder, and code edits that change no number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from gill_errors import StageError
from gill_progress import duration
from settings.params import Params
from workfolder import ASIDE, WorkFolder, accept_edits, is_free, list_entries, prune


def show(params: Params, *, delete: bool) -> None:
    """List what lies in the work folder; with `delete`, remove what nobody names."""
    work = WorkFolder.open(params.run.work)
    states = list_entries(work)
    table = Table("what", "size", "age", "state", "used by", box=None, pad_edge=False)
    for state in states:
        name = state.folder.relative_to(work.root).as_posix()
        users = ", ".join(map(_short, state.used_by[:3])) + (
            f" and {len(state.used_by) - 3} more" if len(state.used_by) > 3 else ""
        )
        table.add_row(
            name, decimal(state.size), duration(state.age), state.state, users or "nobody"
        )
    console = Console()
    console.print(table)
    unused = [state for state in states if is_free(state)]
    total, free = sum(s.size for s in states), sum(s.size for s in unused)
    console.print(f"{work.root}: {decimal(total)}, of which nobody names {decimal(free)}")
    if delete:
        left = prune(states)
        console.print(f"deleted {len(unused)} of {len(states)}, {decimal(free)}")
        for url in left:
            console.print(f"{url} stays: remove it with your object store's own tools")
    elif unused:
        console.print("`stages work --prune` deletes what no commit, experiment or workspace names")


def restore(params: Params, name: str) -> None:
    """Bring back what was put aside; what is in its place is put aside in turn.

    Raises StageError where nothing was put aside under that name.
    """
    work = WorkFolder.open(params.run.work)
    aside = work.root / name
    if ASIDE not in aside.name or not aside.is_dir():
        known = [
            p.relative_to(work.root).as_posix() for p in sorted(work.root.glob(f"*/*{ASIDE}*"))
        ]
        raise StageError(
            f"nothing is put aside as {name}; there is: {', '.join(known) or 'nothing'}"
        )
    place = aside.with_name(aside.name.partition(ASIDE)[0])
    entry = next((entry for entry in work.entries() if entry.folder == place), None)
    if entry is not None:
        print(f"what is there now is put aside as {entry.put_aside()}")
    aside.rename(place)
    print(f"{name} is back as {place}; the next run of its stage takes it")


def accept(params: Params) -> None:
    """Record that edits of code since the last run change no number, here and with DVC."""
    changed = accept_edits(WorkFolder.open(params.run.work))
    print(f"accepted the code as it is for: {', '.join(changed) or 'nothing, none had changed'}")
    if Path("dvc.lock").is_file():
        done = subprocess.run([sys.executable, "-m", "dvc", "commit", "--force"], check=False)
        if done.returncode:
            raise StageError("`dvc commit --force` failed, see above")


def _short(user: str) -> str:
    """A path or the name of a commit, in few letters."""
    return user if len(user) <= 28 else f"...{user[-25:]}"
