"""Pictures on a pseudo-terminal that says what it can show, and what is told of an answer."""

import base64
import errno
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import tty
from pathlib import Path

import pytest
from PIL import Image

from app.terminal.answer_files import AnswerFolder
from app.terminal.narrator import Narrator
from app.terminal.screen import Screen, open_screen, told_if_long
from gill_errors import WriteFailedError
from pipeline.talking.answers import Ended, GeneratedImage, RetrievedImage, Started, Text

ROOT = Path(__file__).parents[1]
PICTURE = Image.new("RGB", (60, 30), (255, 0, 0))
PICTURE.paste((0, 0, 255), (0, 0, 30, 30))
SHOW = """
from PIL import Image
from app.terminal.screen import open_screen
screen = open_screen()
print("blank:", screen.blank)
screen.show(Image.open(r"{path}"))
"""
NO_SIXEL, KITTY = b"\x1b[?62c", b"\x1b_Gi=1;OK\x1b\\"


def on_terminal(tmp_path: Path, answers: bytes, *, typed: bool = True, **environment: str) -> str:
    """What a terminal of 80 x 24 cells, each 10 x 20 pixels, is sent; it says `answers`."""
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 800, 480))
    tty.setraw(slave)
    os.write(master, answers)
    child = subprocess.Popen(
        [sys.executable, "-c", SHOW.format(path=path)],
        stdin=slave if typed else subprocess.DEVNULL,
        stdout=slave,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={"PATH": "", "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment},
    )
    os.close(slave)
    sent = b""
    while True:
        try:
            sent += os.read(master, 65536)
        except OSError:  # the child has closed it
            break
    os.close(master)
    _, errors = child.communicate()
    assert child.returncode == 0, errors.decode()
    return sent.decode()


def test_sixels_where_the_terminal_has_them(tmp_path):
    sent = on_terminal(tmp_path, b"\x1b[?62;4c")
    [sixels] = re.findall(r"\x1bP[\d;]*q(.*?)\x1b\\", sent, re.DOTALL)
    # 40 columns of 10 pixels, and half as many of 20 because the picture is half as high.
    assert sixels.startswith('"1;1;480;240')
    palette = set(re.findall(r"#\d+;2;(\d+;\d+;\d+)", sixels))
    assert palette >= {"100;0;0", "0;0;100"}


def test_kitty_s_graphics_hold_the_picture(tmp_path):
    sent = on_terminal(tmp_path, NO_SIXEL + KITTY)
    chunks = re.findall(r"\x1b_Gi=\d+,m=[01],f=100,q=2;([^\x1b]*)\x1b\\", sent)
    shown = Image.open(io.BytesIO(base64.b64decode("".join(chunks))))
    assert shown.size == (480, 240)
    assert (shown.getpixel((5, 5)), shown.getpixel((470, 230))) == ((0, 0, 255), (255, 0, 0))


def test_half_blocks_where_it_has_neither(tmp_path):
    sent = on_terminal(tmp_path, NO_SIXEL)
    rows = [line for line in sent.splitlines() if "▀" in line]
    assert (len(rows), rows[0].count("▀")) == (12, 48)
    assert "38;2;0;0;255;48;2;0;0;255m▀" in rows[0]
    assert "38;2;255;0;0;48;2;255;0;0m▀" in rows[-1]


@pytest.mark.parametrize(
    ("typed", "term", "reason"),
    [
        (False, "xterm-256color", "the input is no terminal, so it cannot say what it shows"),
        (True, "dumb", "TERM=dumb shows no colours"),
    ],
)
def test_why_no_picture_is_shown(tmp_path, typed, term, reason):
    sent = on_terminal(tmp_path, b"", typed=typed, TERM=term, COLORTERM="")
    assert sent.splitlines() == [f"blank: {reason}"]


def test_what_is_no_terminal_shows_nothing_and_needs_no_reason(capsys):
    screen = open_screen()
    screen.show(PICTURE)
    assert (screen.renderable, screen.blank, capsys.readouterr().out) == (None, "", "")


def made(seed: int) -> GeneratedImage:
    return GeneratedImage(PICTURE, seed, 3, 2.5)


FOUND = RetrievedImage(PICTURE, 7, 0.5, "red.png", "red")


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([Text("."), made(0)], "[G0]"),
        ([Text(" ."), made(0), Text(".")], "[G0]"),
        ([Text(" a"), Text(" ring."), made(0), Text(" it turns.")], "a ring.\n[G0]\nit turns."),
        ([Text("."), Text(" it turns"), FOUND], ". it turns\n[R1]"),
        ([Text(".")], "."),
        ([Text(" a ring")], "a ring"),
        ([], ""),
    ],
)
def test_words_are_told_as_they_come_but_no_lone_full_stop(tmp_path, capsys, pieces, told):
    narrator = Narrator(AnswerFolder(tmp_path / "answer"), Screen(open_screen().console))
    described = narrator.tell([Started(3, 0), *pieces, Ended("stop", 9)])
    lines = capsys.readouterr().out.splitlines()
    names = {"[G0]": "[generated picture: ", "[R1]": "[retrieved picture: "}
    assert len(lines) == len(told.splitlines())
    for line, expected in zip(lines, told.splitlines()):
        assert line.startswith(names.get(expected, expected))
        assert expected in names or line == expected
    assert [one["kind"] for one in described if one["kind"] != "text"] == [
        "generated" if isinstance(piece, GeneratedImage) else "retrieved"
        for piece in pieces
        if not isinstance(piece, Text)
    ]
    for one in described:
        if one["kind"] != "text":
            assert Image.open(one["path"]).tobytes() == PICTURE.tobytes()


def test_every_answer_has_a_folder_of_its_own_and_none_without_a_picture(tmp_path):
    below = tmp_path / "answer"
    first, second = AnswerFolder(below), AnswerFolder(below)
    assert not below.exists()
    paths = [folder.save(PICTURE) for folder in (first, second, first)]
    (below / "017").mkdir()
    (below / "notes").mkdir()
    paths.append(AnswerFolder(below).save(PICTURE))
    assert [str(path.relative_to(below)) for path in paths] == [
        "001/00.png", "002/00.png", "001/01.png", "018/00.png"]  # fmt: skip


def test_a_picture_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, attribute in ((Path, "mkdir"), (Image.Image, "save")):
        with monkeypatch.context() as disk:
            folder = AnswerFolder(tmp_path / "answer")
            disk.setattr(place, attribute, full)
            with pytest.raises(WriteFailedError, match=r"answer cannot be written \(No space left"):
                folder.save(PICTURE)


def test_only_what_takes_long_is_told(capsys):
    with told_if_long("loading", seconds=60):
        pass
    assert capsys.readouterr().err == ""
    with told_if_long("loading", seconds=0):
        while not (told := capsys.readouterr().err):
            pass
    assert told == "loading ...\n"
