"""Makes the pictures of a batch of answers: those sampled alike together, step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from pipeline.frozen.image_generator import OnStep
from pipeline.settings import GenerationSettings
from pipeline.talking.answers import GeneratedImage, PictureProgress
from pipeline.talking.speaker import Speaker


@dataclass(eq=False)
class PendingPicture:
    """A picture that is to be generated for a row of a batch; the best of `seeds` is shown."""

    row: int
    hidden: Float[Tensor, "1 r e"]
    seeds: list[int]
    generation: GenerationSettings
    negative_prompt: str
    probability: float | None
    is_cancelled: Callable[[], bool]
    made: list[Image.Image] = field(default_factory=list)
    result: GeneratedImage | None = None


def make_pictures(
    speaker: Speaker, pictures: Sequence[PendingPicture]
) -> Iterator[tuple[PendingPicture, PictureProgress | None]]:
    """Give every picture its `result`, unless it is cancelled.

    (picture, PictureProgress) as it is being made; (picture, None) when it is ready.
    """
    # Pictures of one batch share steps, guidance and what is led away from; seeds are their own.
    alike: dict[tuple[GenerationSettings, str], list[PendingPicture]] = {}
    for picture in pictures:
        alike.setdefault((picture.generation, picture.negative_prompt), []).append(picture)
    for group in alike.values():
        jobs = [(picture, seed) for picture in group for seed in picture.seeds]
        size = group[0].generation.batch_size
        # Asked before every batch: whoever has left meanwhile is not drawn for.
        while jobs := [job for job in jobs if not job[0].is_cancelled()]:
            batch, jobs = jobs[:size], jobs[size:]
            yield from _make_batch(speaker, batch)


def _make_batch(
    speaker: Speaker, jobs: Sequence[tuple[PendingPicture, int]]
) -> Generator[tuple[PendingPicture, PictureProgress | None], None, None]:
    generator = speaker.generator
    assert generator is not None
    generation, negative_prompt = jobs[0][0].generation, jobs[0][0].negative_prompt
    prompts = speaker.model.conditioning(torch.cat([picture.hidden for picture, _ in jobs]))
    away = speaker.empty_prompt
    if negative_prompt:
        assert speaker.conditioner is not None
        away = speaker.conditioner().encode([negative_prompt])
    batch = list(dict.fromkeys(picture for picture, _ in jobs))

    def work(on_step: OnStep) -> list[Image.Image]:
        return generator.generate(
            prompts, away, seeds=[seed for _, seed in jobs], settings=generation, on_step=on_step
        )

    steps = _steps_of(work, lambda: all(picture.is_cancelled() for picture in batch))
    while True:
        try:
            step, total, previews = next(steps)
        except StopIteration as stop:
            found: list[Image.Image] | None = stop.value
            break
        for picture in batch:
            # A picture chosen among many may need several batches: its steps go on counting.
            before, num = len(picture.made), len(picture.seeds)
            share = sum(one is picture for one, _ in jobs)
            done = round(total * (before + share * step / total) / num)
            preview = None
            if previews is not None:
                preview = next(p for p, (one, _) in zip(previews, jobs) if one is picture)
            yield picture, PictureProgress(done, total, preview)
    if found is None:
        return
    for (picture, _), image in zip(jobs, found):
        picture.made.append(image)
    for picture in batch:
        if len(picture.made) == len(picture.seeds):
            picture.result = _best(speaker, picture)
            yield picture, None


@torch.no_grad()
def _best(speaker: Speaker, picture: PendingPicture) -> GeneratedImage:
    """Of several candidates the one whose key is closest to the text query."""
    best, score = 0, None
    if len(picture.made) > 1:
        pooled = speaker.encoder.encode_pictures(picture.made)
        keys = speaker.model.image_key(pooled.to(speaker.language_model.device, torch.float32))
        scores = (keys @ speaker.model.text_query(picture.hidden)[0]).float()
        best = int(scores.argmax())
        score = float(scores[best])
    return GeneratedImage(
        picture.made[best],
        picture.seeds[best],
        picture.generation.steps,
        picture.generation.guidance,
        picture.probability,
        picture.generation.scheduler,
        picture.negative_prompt,
        score,
    )


_Step = tuple[int, int, list[Image.Image] | None]


class _AbandonedError(Exception):
    """Nobody waits for this picture any more."""


def _steps_of(
    work: Callable[[OnStep], list[Image.Image]],
    is_abandoned: Callable[[], bool],
) -> Generator[_Step, None, list[Image.Image] | None]:
    """Run `work(on_step)` in a thread, yield its steps as they come, and return what it returns.

    None when it was abandoned; closing the generator abandons it too, at its next step.
    """
    steps: SimpleQueue[_Step | None] = SimpleQueue()
    closed = threading.Event()

    def on_step(done: int, total: int, previews: list[Image.Image] | None) -> None:
        if closed.is_set() or is_abandoned():
            raise _AbandonedError
        steps.put((done, total, previews))

    # The sampler calls back from within its loop. In a thread, with a queue between, its steps can
    # be waited for like any iterator's.
    with ThreadPoolExecutor(1, "pictures") as pool:
        future = pool.submit(work, on_step)
        # Also after an error, which `result` raises below.
        future.add_done_callback(lambda _: steps.put(None))
        try:
            while (step := steps.get()) is not None:
                yield step
        finally:
            # Leaving the `with` waits for the thread, which finds this at its next step.
            closed.set()
        try:
            return future.result()
        except _AbandonedError:
            return None
