"""The worker on tiny models: nobody who wants words waits for somebody else's picture."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.serving.job import Failed, Job
from app.serving.worker import Worker
from gill.loading import Gill
from pipeline.talking.answers import Ended, GeneratedImage, Text
from tests.tiny_gill import tiny_gill

SECONDS = 20


@pytest.fixture(scope="module")
def gill() -> Gill:
    return tiny_gill()


class Easel:
    """The generator makes pictures only while `go` is set; `made` lists how many at once."""

    def __init__(self, gill: Gill, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.began = threading.Event(), threading.Semaphore(0)
        self.made: list[int] = []
        generate = gill.generator.generate  # type: ignore[union-attr]

        def wait_and_generate(*given: Any, **how: Any) -> Any:
            self.made.append(len(how["seeds"]))
            self.began.release()
            assert self.go.wait(SECONDS)
            return generate(*given, **how)

        monkeypatch.setattr(gill.generator, "generate", wait_and_generate)


@pytest.fixture
def easel(gill: Gill, monkeypatch: pytest.MonkeyPatch) -> Easel:
    return Easel(gill, monkeypatch)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(max_waiting=16, max_batch=4)
    yield worker
    worker.close()


def job_of(gill: Gill, want: str, **knobs: Any) -> tuple[Job, queue.SimpleQueue[Any]]:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    settings = gill.settings(want=want, max_tokens=4, **knobs)
    return Job(gill.conversation(), lambda: ["a red ring"], settings, heard.put), heard


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def until_end(heard: queue.SimpleQueue[Any]) -> list[Any]:
    events = [heard.get(timeout=SECONDS)]
    while not isinstance(events[-1], Ended | Failed):
        events.append(heard.get(timeout=SECONDS))
    return events


def test_words_leave_a_batch_that_waits_for_a_picture_and_come_beside_it(
    gill: Gill, worker: Worker, easel: Easel
) -> None:
    (picture, seen), (words, heard) = job_of(gill, "generate"), job_of(gill, "text")
    worker.submit(picture, words)
    assert isinstance(until_end(heard)[-1], Ended)
    assert easel.began.acquire(timeout=SECONDS)
    late, heard_late = job_of(gill, "text")
    worker.submit(late)
    said = until_end(heard_late)
    assert [type(event) for event in said[-2:]] == [Text, Ended]
    until(lambda: (worker.num_running, worker.num_waiting) == (1, 0))
    easel.go.set()
    assert [type(event) for event in until_end(seen)[-2:]] == [GeneratedImage, Ended]


def test_pictures_that_were_asked_for_while_one_was_made_are_made_together(
    gill: Gill, worker: Worker, easel: Easel
) -> None:
    asked = [job_of(gill, "generate", seed=seed) for seed in range(4)]
    worker.submit(asked[0][0])
    assert easel.began.acquire(timeout=SECONDS)
    for job, _ in asked[1:]:
        worker.submit(job)
    until(lambda: worker.num_waiting == 3 and worker.num_running == 1)  # all have spoken
    easel.go.set()
    pictures = [until_end(heard)[-2] for _, heard in asked]
    assert [picture.seed for picture in pictures] == [0, 1, 2, 3]
    assert easel.made == [1, 3]


def test_pictures_that_cannot_be_made_together_are_tried_alone(
    gill: Gill, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = gill.generator.generate  # type: ignore[union-attr]

    def fail_together(*given: Any, **how: Any) -> Any:
        if 7 in how["seeds"]:
            raise RuntimeError("told to")
        return generate(*given, **how)

    monkeypatch.setattr(gill.generator, "generate", fail_together)
    asked = [job_of(gill, "generate", seed=seed) for seed in (6, 7, 8)]
    worker.submit(*(job for job, _ in asked))
    (*_, made, end), broken, (*_, last, _) = (until_end(heard) for _, heard in asked)
    assert (made.seed, end.reason, last.seed) == (6, "max_images", 8)
    assert broken[-1] == Failed.because("broken")


def test_closing_tells_who_waits_for_a_picture(gill: Gill, easel: Easel) -> None:
    worker = Worker()
    (first, seen), (second, unseen) = job_of(gill, "generate"), job_of(gill, "generate")
    worker.submit(first)
    assert easel.began.acquire(timeout=SECONDS)
    worker.submit(second)
    closing = threading.Thread(target=worker.close)
    closing.start()
    easel.go.set()
    for heard in (seen, unseen):
        assert until_end(heard)[-1] == Failed.because("left")
    closing.join(SECONDS)
    assert not closing.is_alive()
