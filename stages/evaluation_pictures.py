"""Pictures of every method for every example, in batches, each made once.

A batch is the same examples in every run (0 to B - 1, B to 2 B - 1, ...) and is saved whole before
the next one begins, so that an interruption costs one batch and changes no picture.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image

from app.gill import Gill
from corpora.pictures import open_picture, read_picture
from pipeline.evaluation import (
    generate_pictures,
    gill_conditioning,
    read_contexts,
    text_conditioning,
)
from pipeline.settings import GenerationSettings
from pipeline.text_conditioner import Conditioning, TextConditioner
from stages.evaluation_sets import EvaluationSet, Example, Picture
from stages.evaluation_store import EvaluationStore, key_for
from stages.failures import StageError
from stages.progress import Ticker

Method = Literal["generator", "gill"]
METHODS: dict[str, str] = {"generator": "generator alone", "gill": "GILL"}


class PictureMaker:
    """Makes what is not there yet; `seed` + i is the seed of example i."""

    def __init__(self, gill: Gill, store: EvaluationStore, seed: int) -> None:
        self._gill, self._store, self._seed = gill, store, seed

    def make(self, one: EvaluationSet, method: Method, settings: GenerationSettings) -> list[Path]:
        """The pictures of a set, in the order of its examples."""
        keys = [
            self._key(example, method, self._seed + index, settings)
            for index, example in enumerate(one.examples)
        ]
        size = settings.batch_size
        batches = [range(i, min(i + size, len(keys))) for i in range(0, len(keys), size)]
        todo = [b for b in batches if any(self._store.picture(method, keys[i]) is None for i in b)]
        with Ticker(f"{one.title}, {METHODS[method]}") as ticker:
            meter = Meter(sum(map(len, todo)), "pictures")
            for batch in todo:
                examples = [one.examples[i] for i in batch]
                pictures = self._generate(examples, method, batch.start, settings)
                for i, picture in zip(batch, pictures, strict=True):
                    self._store.save_picture(method, one.name, i, keys[i], picture)
                ticker.show(meter.after(len(batch)))
        paths = [self._store.picture(method, key) for key in keys]
        assert all(path is not None for path in paths)
        return [path for path in paths if path is not None]

    def _generate(
        self, examples: Sequence[Example], method: Method, first: int, settings: GenerationSettings
    ) -> list[Image.Image]:
        speaker = self._gill.speaker
        if speaker.generator is None:
            raise StageError("no image generator is loaded")
        return generate_pictures(
            speaker.generator,
            self._conditioning(examples, method),
            speaker.empty_prompt,
            settings,
            self._seed + first,
        )

    def _conditioning(self, examples: Sequence[Example], method: Method) -> Conditioning:
        if method == "generator":
            return text_conditioning(self._conditioner, [e.prompt for e in examples])
        speaker = self._gill.speaker
        contexts = [opened(example.context) for example in examples]
        hidden = read_contexts(speaker.gill, speaker.encoder, contexts)
        return gill_conditioning(speaker.gill, hidden)

    @cached_property
    def _conditioner(self) -> TextConditioner:
        """The generator's own text side, loaded when the baseline first needs it."""
        if self._gill.speaker.conditioner is None:
            raise StageError("the generator's own text encoder cannot be loaded")
        return self._gill.speaker.conditioner()

    def _key(
        self, example: Example, method: Method, seed: int, settings: GenerationSettings
    ) -> str:
        """Of all that a picture depends on, but for the models; pictures count by content."""
        read = (
            [example.prompt]
            if method == "generator"
            else [
                part if isinstance(part, str) else {"picture": content_of(part.reference)}
                for part in example.context
            ]
        )
        sampling = settings.model_dump(include={"steps", "guidance", "scheduler"})
        return key_for(read, seed, sampling)


class Meter:
    """How far long work is, how fast, and how long it will still take."""

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit, self._done = total, unit, 0
        self._start = time.monotonic()

    def after(self, number: int) -> str:
        """The state after `number` more: `96 of 100 pictures, 12.3 per second, 1 s left`."""
        self._done += number
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._done) / rate
        return (
            f"{self._done} of {self._total} {self._unit}, {rate:.1f} per second, "
            f"{_duration(left)} left"
        )


def opened(context: Sequence[str | Picture]) -> list[str | Image.Image]:
    """A context with its pictures decoded."""
    return [part if isinstance(part, str) else open_picture(part.reference) for part in context]


@lru_cache(maxsize=200_000)
def content_of(reference: str) -> str:
    """A hash of a picture's bytes, taken once per run."""
    return hashlib.blake2b(read_picture(reference), digest_size=16).hexdigest()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
