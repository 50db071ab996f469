"""One run at a time on one store."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from cache.location import Location
from gill_errors import GillError
from gill_files import explained


class StoreLockedError(GillError, RuntimeError):
    """Another run is filling, repairing or removing this store."""


@contextmanager
def run_lock(store: Location) -> Iterator[str]:
    """Hold `store` for one run; yields the run's id. A dead process holds nothing.

    Local: `flock` on `<store>.lock`, which the kernel lets go when the process ends, however it
    ends. Object store: an object `<store>.lock` naming host, process and its start time; one left
    by a dead process of this host is taken over, one of another host is refused with what to do.

    Raises StoreLockedError naming the holder; OSError where nothing can be written beside the
    store.
    """
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "run": uuid.uuid4().hex,
    }
    lock = store.beside(".lock")
    with _flock(lock, holder) if store.is_local else _lock_object(lock, holder):
        yield holder["run"]


def current_run(store: Location) -> str | None:
    """The id of the run that holds, or held last, the lock of `store`."""
    text = store.beside(".lock").read_text()
    return json.loads(text)["run"] if text else None


@contextmanager
def _flock(lock: Location, holder: dict) -> Iterator[None]:
    with explained(lock):
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        f = lock.path.open("a+")
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise StoreLockedError(_refusal(lock, f.read())) from None
        f.truncate(0)
        f.write(json.dumps(holder))
        f.flush()
        os.fsync(f.fileno())  # workers on other machines read the run's id over the network
        # The file stays afterwards: removing a file that others may be locking is a race.
        yield


@contextmanager
def _lock_object(lock: Location, holder: dict) -> Iterator[None]:
    text = json.dumps(holder)
    try:
        with explained(lock):
            lock.create_text(text)
    except FileExistsError:
        found = lock.read_text() or ""
        if not _is_dead(found):
            raise StoreLockedError(_refusal(lock, found)) from None
        lock.write_text(text)
    try:
        yield
    finally:
        lock.remove()


def _is_dead(text: str) -> bool:
    """True where the holder was a process of this host that no longer runs."""
    if not text:
        return True
    holder = json.loads(text)
    if holder["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 1.0
    except psutil.NoSuchProcess:
        return True


def _refusal(lock: Location, text: str) -> str:
    holder = json.loads(text) if text else {"host": "?", "pid": "?"}
    advice = "wait for it to end, or end it"
    if not lock.is_local:
        advice += f"; if that host is gone for good, remove {lock}"
    return (
        f"{lock.url.removesuffix('.lock')}: process {holder['pid']} on {holder['host']} "
        f"is at work on this store: {advice}"
    )
