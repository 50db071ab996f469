"""Headers are read in processes of their own: same verdicts, and nobody stays behind."""

import io
import os
import resource
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
from PIL import Image

from corpora import picture_checks
from corpora.caption_params import CheckLevel
from corpora.captions import CaptionParams, check_captions
from corpora.picture_verdicts import HeaderReaders, Pictures, Verdict, judge
from corpora.pictures import MAX_PIXELS, stat_picture
from corpora.records import CorpusError
from gill_errors import OutOfMemoryError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Three hundred pictures of all kinds and conditions, one caption each."""
    lines = ["caption\timage"]
    for number in range(300):
        kind = ("png", "jpg", "webp", "tif", "gif")[number % 5]
        data = io.BytesIO()
        Image.new("RGB", (4, 3), (number % 255, 0, 0)).save(data, Image.EXTENSION[f".{kind}"])
        whole = data.getvalue()
        (tmp_path / f"{number}.{kind}").write_bytes(
            whole[: number % 40] if number % 9 == 0 else whole
        )
        lines.append(f"caption {number}\t{number}.{kind}")
    (tmp_path / "table.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "table.tsv"


def test_other_processes_give_the_same_report_and_table(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(folder: Path) -> list[bytes]:
        folder.mkdir()
        check_captions(CaptionParams(table=str(table), check="header"), folder / "out.parquet")
        return [path.read_bytes() for path in sorted(folder.glob("out.[!p]*"))] + [
            (folder / "out.parquet").read_bytes()
        ]

    far = written(table.parent / "far")
    monkeypatch.setattr(picture_checks, "_WORTH_PROCESSES", 10**9)
    monkeypatch.setattr(HeaderReaders, "judge", None)
    assert written(table.parent / "here") == far
    assert b"picture unreadable" in far[0]


def test_a_process_that_was_killed_is_named_and_its_verdicts_are_not_lost(table: Path) -> None:
    pictures = {str(table.parent / name): stat_picture(table.parent / name) for name in ("1.jpg",)}
    readers = HeaderReaders(MAX_PIXELS)
    assert readers.judge(pictures) == judge(pictures, "header", MAX_PIXELS)
    process = readers._idle.get()
    process.kill()
    readers._idle.put(process)
    with pytest.raises(
        CorpusError, match=r"headers from .*1\.jpg on has ended with -9 .* run it ag"
    ):
        readers.judge(pictures)
    assert readers.judge(pictures) == judge(pictures, "header", MAX_PIXELS), "another takes over"
    readers.close()


def test_want_of_memory_is_not_the_fault_of_a_picture(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.webp"
    Image.new("RGB", (4, 3)).save(small)
    large.write_bytes(b"RIFF\0\0\0\x20WEBPVP8 ")
    os.truncate(large, 2**29)
    readers = HeaderReaders(MAX_PIXELS)
    assert isinstance(readers.judge({str(small): stat_picture(small)})[0], Verdict)
    process = readers._idle.get()
    used = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(process.pid, resource.RLIMIT_AS, (used + 2**26, used + 2**26))
    readers._idle.put(process)
    with pytest.raises(OutOfMemoryError, match=r"not enough memory to open .*large.webp"):
        readers.judge({str(large): stat_picture(large)})
    readers.close()


_ASKS = """
import sys, time
from corpora.picture_verdicts import HeaderReaders
from corpora.pictures import stat_picture
readers = HeaderReaders(10**6)
readers.judge({sys.argv[1]: stat_picture(sys.argv[1])})
print(readers._idle.get().pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_reader_ends_with_the_one_that_asks(table: Path, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _ASKS, str(table.parent / "1.jpg")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        reader = int(process.stdout.readline())
        assert Path(f"/proc/{reader}").exists()
        os.killpg(process.pid, how) if how == signal.SIGINT else process.send_signal(how)
        process.wait()
        deadline = time.monotonic() + 20
        while _runs(reader):
            assert time.monotonic() < deadline, "it stayed behind"
            time.sleep(0.05)
        assert process.stderr.read().count("Traceback") <= 1, "the reader is silent"


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_who_asks_for_a_picture_that_is_being_looked_at_gets_the_same_verdict(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    usual = picture_checks.judge

    def counted(pictures: Pictures, check: CheckLevel, max_pixels: int) -> list[Verdict]:
        looked_at.extend(pictures)
        return usual(pictures, check, max_pixels)

    monkeypatch.setattr(picture_checks, "judge", counted)
    names = sorted(str(path) for path in table.parent.glob("*.png"))[:3]
    with picture_checks.PictureChecks(table.with_suffix(".sqlite"), "decode", 100, 2) as checks:
        first, second = checks.ask(names[:2]), checks.ask(names[1:])
        # The one that asked later may wait first.
        assert list(second()) == [names[2], names[1]]
        assert second()[names[1]] == first()[names[1]] == checks.ask(names[1:])()[names[1]]
        assert checks._coming == {}
        kept = weakref.ref(first)
        del first
        assert kept() is None  # although `second`, which asked it, is still there
    assert sorted(looked_at) == names
