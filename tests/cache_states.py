"""A store under whatever befalls it, in any order, beside plain dictionaries of what it must hold.

What changes a store runs in a forked process: killed by SIGKILL before one of its changes of the
file system (or after a while), or refused by the system from one of them on, as by a full or a
read-only disk. What the store then holds is read by plain Zarr.
"""

import errno
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from test_cache_samples import fill_sample, make_spec, value

from cache import (
    DamagedRowsError,
    NotAStoreError,
    ReadingParams,
    RowStatus,
    RowsUnavailableError,
    ShuffledRows,
    StoreLockedError,
    copy_rows,
    drop_rows,
    read_rows,
    repair,
    verify,
)
from cache.checksums import row_keys
from cache.codec import FittedCodec, encode
from gill_errors import WriteFailedError

SHARD_ROWS = 4
NAMES = [*(f"caption {i}" for i in range(40)), "unreadable one", "unreadable two"]
BY_KEY = dict(zip(row_keys(NAMES).tolist(), NAMES))
SPECS = {
    "float16": make_spec(SHARD_ROWS),
    "int8": make_spec(SHARD_ROWS, dtype="int8", share_first=True, compressor="zstd"),
}
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
KILL = -1
FULL, READ_ONLY = errno.ENOSPC, errno.EROFS
SOME_NAMES = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6)
MOMENTS = st.integers(1, 60)  # a fill of these stores makes some 40 to 140 changes


class Child:
    """A forked process that does one thing. `fault`: at its `moment`-th change, KILL, or an errno
    from there on."""

    def __init__(self, act: Callable[[], Any], moment: int = 0, fault: int | None = None) -> None:
        self._reading, writing = os.pipe()
        self._id = os.fork()
        if self._id:
            os.close(writing)
            return
        try:
            if fault is not None:
                sys.addaudithook(_fault_at(moment, fault))
            answer: tuple[str, Any] = ("gave", act())
        except BaseException as error:
            answer = ("raised", error)
        try:
            os.write(writing, pickle.dumps(answer))
        finally:
            os._exit(0)

    def kill(self) -> None:
        os.kill(self._id, signal.SIGKILL)

    def wait(self) -> tuple[str, Any]:
        """("gave", what), ("raised", an exception) or ("killed", None)."""
        with os.fdopen(self._reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self._id, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return "killed", None
        assert answer, "a child that neither gave nor raised"
        return pickle.loads(answer)


def _fault_at(moment: int, fault: int) -> Callable[[str, tuple[Any, ...]], None]:
    left = [moment]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not _writes(args)):
            return
        left[0] -= 1
        if fault == KILL and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        # A full disk lets go of files, a read-only one does not.
        if fault != KILL and left[0] <= 0 and (fault == READ_ONLY or event in ("open", "os.mkdir")):
            raise OSError(fault, os.strerror(fault))

    return hook


def _writes(args: tuple[Any, ...]) -> bool:
    path, _, flags = args
    return flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) != 0 and path != os.devnull


def when_settled(act: Callable[..., None]) -> Callable[..., None]:
    """Act if the last fill has ended well; else look at what it left.

    No precondition of Hypothesis: a kill after a while leaves another state each time, and which
    rules there are must not depend on that.
    """

    @wraps(act)
    def acts(self: "StoreMachine", **drawn: Any) -> None:
        if self.unsettled:
            self.look_at_what_was_cut_off()
        else:
            act(self, **drawn)

    return acts


class StoreMachine(RuleBasedStateMachine):
    """`table`: what the store should be filled with. `done`, `failed`: row -> what it was made of,
    as the store has to record it; `bad`: done rows whose bytes were damaged."""

    steps: ClassVar[int] = 0
    kills: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.path = self.folder / "s.zarr"
        self.table: list[str] = []
        self.done: dict[int, str] = {}
        self.failed: dict[int, str] = {}
        self.bad: set[int] = set()
        self._seen: list[tuple[int, int, int]] = []
        self.unsettled = True  # whether a fill has been cut off, or there was none yet

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(kind=st.sampled_from(sorted(SPECS)), names=SOME_NAMES)
    def begin(self, kind: str, names: list[str]) -> None:
        self.spec, self.table = SPECS[kind], list(names)
        self._keep_one_that_can_be_read()

    # What changes the table

    @rule(names=SOME_NAMES)
    def append(self, names: list[str]) -> None:
        self.table = (self.table + names)[:24]

    @rule(at=st.integers(0, 23), name=st.sampled_from(NAMES))
    def change_a_row(self, at: int, name: str) -> None:
        self.table[at % len(self.table)] = name
        self._keep_one_that_can_be_read()

    @rule(at=st.integers(0, 23), name=st.sampled_from(NAMES))
    def insert_a_row(self, at: int, name: str) -> None:
        self.table.insert(at % len(self.table), name)

    @rule(start=st.integers(1, 23), count=st.integers(1, 8))
    def lose_rows(self, start: int, count: int) -> None:
        del self.table[start : start + count]
        self._keep_one_that_can_be_read()

    # What changes the store

    @rule()
    def fill(self) -> None:
        expected = self._pending()
        how, report = Child(self._fill).wait()
        assert how == "gave", repr(report)
        assert report.encoded == len(expected)
        self._filled()
        assert (report.done, len(report.failed)) == (len(self.done), len(self.failed))

    @rule(moment=MOMENTS)
    def fill_and_be_killed(self, moment: int) -> None:
        how, report = Child(self._fill, moment, KILL).wait()
        assert how in ("gave", "killed"), repr(report)
        self._cut_off(how)

    @rule(seconds=st.floats(0, 0.2))
    def fill_and_be_killed_after_a_while(self, seconds: float) -> None:
        child = Child(self._fill)
        time.sleep(seconds)
        child.kill()
        self._cut_off(child.wait()[0])

    @rule(moment=MOMENTS)
    def fill_a_full_disk(self, moment: int) -> None:
        how, report = Child(self._fill, moment, FULL).wait()
        assert how == "gave" or isinstance(report, WriteFailedError), repr(report)
        self._cut_off(how)

    @rule()
    def fill_a_read_only_disk(self) -> None:
        how, error = Child(self._fill, 1, READ_ONLY).wait()
        assert how == "raised"
        assert isinstance(error, WriteFailedError), repr(error)

    @rule()
    def two_writers(self) -> None:
        writers = [Child(self._fill), Child(self._fill)]
        answers = [writer.wait() for writer in writers]
        refused = [answer for how, answer in answers if how != "gave"]
        assert len(refused) < 2, repr(refused)
        assert all(isinstance(error, StoreLockedError) for error in refused), repr(refused)
        self._filled()

    @rule(rows=st.sets(st.integers(0, 23), max_size=4))
    @when_settled
    def drop(self, rows: set[int]) -> None:
        rows = {row for row in rows if row in self.done}
        how, error = Child(lambda: drop_rows(self.path, rows)).wait()
        assert how == "gave", repr(error)
        self.failed |= {row: self.done.pop(row) for row in rows}
        self.bad -= rows

    @rule(order=st.permutations(range(24)), count=st.integers(1, 24), moment=MOMENTS)
    @when_settled
    def copy_in_another_order(self, order: list[int], count: int, moment: int) -> None:
        rows = [row for row in order if row in self.done or row in self.failed][:count]
        copy = self.folder / "copy.zarr"
        act = lambda: copy_rows(self.path, copy, rows).num_rows  # noqa: E731
        how, error = Child(act, moment, KILL).wait()
        assert how in ("gave", "killed"), repr(error)
        self._count(how)
        if how == "killed":
            how, error = Child(act).wait()
            assert how == "gave", repr(error)
        shutil.rmtree(self.path)
        copy.rename(self.path)
        for name in ("s.manifest.json", "copy.lock"):
            (self.folder / name).unlink(missing_ok=True)
        with_manifest = self.folder / "copy.manifest.json"
        if with_manifest.exists():
            with_manifest.rename(self.folder / "s.manifest.json")
        sound = {new: old for new, old in enumerate(rows) if old in self.done.keys() - self.bad}
        self.table = [(self.done | self.failed)[row] for row in rows]
        self.done = {new: self.done[old] for new, old in sound.items()}
        self.failed, self.bad = {}, set()
        self._keep_one_that_can_be_read()

    @rule(
        array=st.sampled_from(["embedding", "pooled"]),
        row=st.integers(0, 23),
        how=st.sampled_from(["flip", "truncate", "delete"]),
        place=st.floats(0, 1, exclude_max=True),
    )
    def damage(self, array: str, row: int, how: str, place: float) -> None:
        if not self.done:
            return
        shard = sorted(self.done)[row % len(self.done)] // SHARD_ROWS
        file = next((self.path / array / "c" / str(shard)).rglob("0"), None)
        while file is not None and file.is_dir():
            file = next(file.rglob("0"), None)
        content = bytearray(file.read_bytes()) if file else bytearray()
        if not content:  # zeros have no file, and one may have been cut to nothing
            return
        at = int(place * len(content))
        if how == "delete":
            file.unlink()
        elif how == "truncate":
            file.write_bytes(content[:at])
        else:
            content[at] ^= 1 << at % 8
            file.write_bytes(content)
        _, _, bad = self._observed()
        assert {row // SHARD_ROWS for row in bad - self.bad} <= {shard}
        self.bad = bad

    @rule(killed=st.booleans(), moment=st.integers(1, 12))
    @when_settled
    def repair(self, killed: bool, moment: int) -> None:
        act = lambda: repair(self.path).bad_rows  # noqa: E731
        if killed:
            how, _ = Child(act, moment, KILL).wait()
            self._count(how)
        how, rows = Child(act).wait()
        assert how == "gave", repr(rows)
        assert killed or rows == sorted(self.bad)
        self.done = {row: name for row, name in self.done.items() if row not in self.bad}
        self.bad = set()

    # What only looks

    @rule()
    @when_settled
    def verify(self) -> None:
        how, report = Child(lambda: verify(self.path)).wait()
        assert how == "gave", repr(report)
        assert report.bad_rows == sorted(self.bad)
        assert report.ok == (not self.bad)
        assert report.checked == 2 * len(self.done)

    @rule(rows=st.lists(st.integers(0, 23), min_size=1, max_size=5))
    @when_settled
    def read_single_rows(self, rows: list[int]) -> None:
        how, values = Child(lambda: read_rows(self.path, rows)).wait()
        if not self.done.keys() >= set(rows):
            assert isinstance(values, RowsUnavailableError), repr(values)
        elif self.bad & set(rows):
            assert isinstance(values, DamagedRowsError), repr(values)
        else:
            assert how == "gave", repr(values)
            self._expect_values(rows, values)

    @rule(batch_size=st.integers(1, 9), seed=st.integers(0, 99), skip=st.booleans())
    @when_settled
    def read_in_a_shuffled_order(self, batch_size: int, seed: int, skip: bool) -> None:
        params = ReadingParams(on_damage="skip" if skip else "stop", block_rows=3, buffer_rows=8)
        names = ("embedding", "pooled")

        def epoch() -> tuple[list[Any], set[int]]:
            sources = {name: (self.path, name) for name in names}
            rows = ShuffledRows(sources, batch_size=batch_size, seed=seed, params=params)
            return list(rows), set(rows.damaged)

        how, answer = Child(epoch).wait()
        if len(self.done) + len(self.failed) < self._rows_stored():
            assert isinstance(answer, RowsUnavailableError), repr(answer)
        elif self.bad and not skip:
            assert isinstance(answer, DamagedRowsError), repr(answer)
        else:
            assert how == "gave", repr(answer)
            batches, damaged = answer
            rows = [row for batch in batches for row in batch.rows.tolist()]
            assert sorted(rows) == sorted(self.done.keys() - self.bad)
            assert damaged == self.bad
            for batch in batches:
                self._expect_values(batch.rows.tolist(), batch.arrays)

    @rule()
    def look(self) -> None:
        self.look_at_what_was_cut_off()

    def look_at_what_was_cut_off(self) -> None:
        how, report = Child(lambda: verify(self.path)).wait()
        if how == "raised":
            assert self.unsettled
            assert isinstance(report, NotAStoreError), repr(report)
        else:
            assert set(report.bad_rows) == self.bad

    @invariant()
    def nothing_is_lost(self) -> None:
        StoreMachine.steps += 1
        if self._unchanged():
            return
        done, failed, bad = self._observed()
        assert (done, failed, bad) == (self.done, self.failed, self.bad)

    # Beside it

    def _unchanged(self) -> bool:
        """Whether no file is another one than at the last look."""
        stats = [path.stat() for path in sorted(self.folder.rglob("*")) if path.is_file()]
        now = [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]
        before, self._seen = self._seen, now
        return before == now

    def _fill(self) -> Any:
        return fill_sample(self.path, self.table, spec=self.spec)

    def _keep_one_that_can_be_read(self) -> None:
        """Codecs are fitted to rows that can be read: without one, a fill is refused."""
        if all("unreadable" in name for name in self.table):
            self.table.append("caption 0")

    def _pending(self) -> set[int]:
        settled = self.done | self.failed
        return {row for row, name in enumerate(self.table) if settled.get(row) != name}

    def _filled(self) -> None:
        """A whole fill has ended well."""
        written = {row // SHARD_ROWS for row in self._pending()}
        rows = dict(enumerate(self.table))
        dropped = {row for row, name in self.failed.items() if rows.get(row) == name}
        self.done = {
            row: name
            for row, name in rows.items()
            if row not in dropped and "unreadable" not in name
        }
        self.failed = {row: name for row, name in rows.items() if row not in self.done}
        self.bad = {row for row in self.bad & self.done.keys() if row // SHARD_ROWS not in written}
        self.unsettled = False

    def _cut_off(self, how: str) -> None:
        """A fill has ended somehow: what was done and is still asked for is done."""
        self._count(how)
        if how == "gave":
            self._filled()
            return
        done, failed, bad = self._observed()
        rows = dict(enumerate(self.table))
        for row, name in self.done.items():
            if rows.get(row) == name:
                assert done.get(row) == name, f"row {row} is lost"
            elif row in done:
                assert done[row] in (name, rows.get(row)), f"row {row} is another"
        for row in done.keys() - self.done.keys():
            assert done[row] == rows[row], f"row {row} is none of the table's"
        assert bad <= self.bad
        self.done, self.failed, self.bad = done, failed, bad
        self.unsettled = True

    def _count(self, how: str) -> None:
        StoreMachine.kills += how == "killed"

    def _rows_stored(self) -> int:
        return zarr.open_group(self.path, mode="r")["row_status"].shape[0]

    def _observed(self) -> tuple[dict[int, str], dict[int, str], set[int]]:
        """done, failed and bad, as plain Zarr finds them."""
        if not (self.path / "row_status" / "zarr.json").exists():
            return {}, {}, set()
        group = zarr.open_group(self.path, mode="r")
        status, keys = group["row_status"][:], group["row_key"][:]
        names = {
            int(row): BY_KEY[int(keys[row])] for row in np.flatnonzero(status != RowStatus.PENDING)
        }
        done = {row: name for row, name in names.items() if status[row] == RowStatus.DONE}
        failed = {row: name for row, name in names.items() if row not in done}
        bad = set[int]()
        for array in self.spec.arrays:
            bad |= _differing(group, array, self._fitted(group, array), done)
        return done, failed, bad

    def _fitted(self, group: zarr.Group, array: str) -> FittedCodec:
        codec = self.spec.arrays[array].codec
        parts = {
            part: group[f"{array}_{part}"][...]
            for part in ("scale", "offset", "first")
            if f"{array}_{part}" in group
        }
        return FittedCodec(codec.dtype, **parts)

    def _expect_values(self, rows: list[int], arrays: dict[str, np.ndarray]) -> None:
        if not rows:
            return
        whole = np.stack([value(self.done[row]) for row in rows])
        np.testing.assert_array_equal(arrays["pooled"], whole[:, -1])
        fitted = self._fitted(zarr.open_group(self.path, mode="r"), "embedding")
        stored, _, _ = encode(fitted, whole)
        if fitted.scale is None:
            np.testing.assert_array_equal(arrays["embedding"], stored)
        else:
            rest = stored * fitted.scale + fitted.offset
            np.testing.assert_allclose(arrays["embedding"][:, 1:], rest, rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(arrays["embedding"][:, :1], whole[:, :1])


def _differing(
    group: zarr.Group, array: str, fitted: FittedCodec, done: dict[int, str]
) -> set[int]:
    """Rows whose stored bytes are not those of what they were made of."""
    if not done:
        return set()
    values = np.stack([value(name) for name in done.values()])
    right, _, _ = encode(fitted, values if array == "embedding" else values[:, -1])
    bad = set()
    stored = group[array]
    try:
        everything = stored[...]
    except Exception:  # a damaged shard: row by row
        everything = None
    for row, expected in zip(done, right):
        try:
            same = np.array_equal(stored[row] if everything is None else everything[row], expected)
        except Exception:
            same = False
        if not same:
            bad.add(row)
    return bad


@pytest.mark.parametrize("fault", [FULL, READ_ONLY])
def test_whichever_change_the_system_refuses_it_is_one_line_and_costs_nothing(
    tmp_path: Path, fault: int
) -> None:
    table = NAMES[:9]

    def is_refused(moment: int) -> bool:
        path = tmp_path / f"{moment}.zarr"
        how, error = Child(lambda: fill_sample(path, table), moment, fault).wait()
        if how == "gave":
            return False
        assert isinstance(error, WriteFailedError), repr(error)
        assert "\n" not in str(error)
        how, report = Child(lambda: fill_sample(path, table)).wait()
        assert (how, report.done) == ("gave", 9), repr(report)
        return True

    # From the making of the store to its manifest: the last change that can be refused is among
    # those that bisecting tries.
    changes = bisect_left(range(1, 500), True, key=lambda moment: not is_refused(moment))
    assert changes > 100


def test_what_a_kill_left_on_a_disk_that_is_read_only_by_now_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fill_sample(path, NAMES[:9])
    (path / ".row_key.partial").touch()
    for moment in range(1, 5):
        _, error = Child(lambda: fill_sample(path, NAMES[:10]), moment, READ_ONLY).wait()
        assert isinstance(error, WriteFailedError), repr(error)
    assert fill_sample(path, NAMES[:10]).encoded == 1


def _run(runs: int, steps: int) -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{StoreMachine.steps:,} steps, {StoreMachine.kills:,} kills")


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_nothing_is_lost() -> None:
    _run(5, 50)


@pytest.mark.torture
def test_nothing_is_lost_in_many_steps() -> None:
    _run(100, 200)
