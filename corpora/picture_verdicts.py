"""Verdicts on pictures, given here or in processes of their own.

Pillow decodes without the interpreter's lock but reads headers with it, so that threads read no
more headers a second than one. `HeaderReaders` are processes that end when their input does: with
this one, however it ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
from typing import NamedTuple

from corpora.caption_params import CheckLevel
from corpora.picture_errors import PictureError, PictureErrorKind
from corpora.pictures import PictureStat, check_picture
from corpora.records import CorpusError
from gill_errors import OutOfMemoryError

Pictures = dict[str, PictureStat]
"""References of pictures that are there, with their sizes and versions."""


class Verdict(NamedTuple):
    """`identity` (16 bytes) of a good picture; otherwise `kind` and `detail` of the refusal."""

    identity: bytes
    kind: PictureErrorKind | None = None
    detail: str = ""


def judge(pictures: Pictures, check: CheckLevel, max_pixels: int) -> list[Verdict]:
    """The verdict on each picture. Raises OutOfMemoryError."""
    return [_judge(name, status, check, max_pixels) for name, status in pictures.items()]


def _judge(reference: str, status: PictureStat, check: CheckLevel, max_pixels: int) -> Verdict:
    try:
        return Verdict(check_picture(reference, check, max_pixels, status))
    except PictureError as error:
        return Verdict(b"", error.kind, error.detail)
    except MemoryError as error:
        raise OutOfMemoryError(
            f"not enough memory to open {reference}: set captions.max_pixels or run.readers "
            "lower; the verdicts so far are kept"
        ) from error


class HeaderReaders:
    """Processes that judge pictures by their headers, each of them started when it is needed."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def judge(self, pictures: Pictures) -> list[Verdict]:
        """As `judge`, in a process that is idle; several threads may ask.

        Raises CorpusError too: the process ended under its work.
        """
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # As plain tuples: named ones take three times as long.
            plain = [(name, *status) for name, status in pictures.items()]
            pickle.dump((plain, self._max_pixels), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise CorpusError(
                f"the process that read the headers from {next(iter(pictures))} on has ended with "
                f"{process.wait()} (-9: killed, mostly for want of memory); run it again: the "
                "verdicts so far are kept"
            ) from error
        self._idle.put(process)
        if isinstance(answer, OutOfMemoryError):
            raise answer
        return [Verdict(*verdict) for verdict in answer]

    def close(self) -> None:
        """End the processes that are idle."""
        while not self._idle.empty():
            with self._idle.get():
                pass

    def _start(self) -> subprocess.Popen[bytes]:
        # The interpreter's own way to start helpers would run the caller's script once more.
        code = f"from {__name__} import serve; serve()"
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )


def serve() -> None:
    """Answer what comes through the standard input until it ends. For `HeaderReaders`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks hears it, and closes the input
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            plain, max_pixels = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            pictures = {name: PictureStat(*status) for name, *status in plain}
            verdicts = judge(pictures, "header", max_pixels)
            answer: list[tuple] | OutOfMemoryError = [tuple(verdict) for verdict in verdicts]
        except OutOfMemoryError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()
