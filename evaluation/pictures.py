"""Pictures of every method for every example, in batches, each made once.

A batch is the same examples in every run (0 to B - 1, B to 2 B - 1, ...) and is saved whole before
the next one begins, so that an interruption costs one batch and changes no picture.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Literal

from PIL import Image

from cluster import Crew
from cluster.versions import library_versions
from corpora.pictures import open_picture, read_picture
from evaluation.progress import Meter
from evaluation.sets import EvaluationSet, Example, Picture
from evaluation.store import EvaluationStore, key_for
from gill.artifacts import Artifacts
from gill.frozen import read_backbones
from gill.loading import Gill, load_encoder, load_generator, load_model, read_empty_prompt
from gill_errors import StageError
from pipeline.bridge.checkpoint import CHECKPOINTS, fingerprint_heads
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.devices import set_up
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.image_generator import ImageGenerator
from pipeline.frozen.text_conditioner import TextConditioner, load_text_conditioner
from pipeline.frozen.visual_encoder import VisualEncoder
from pipeline.settings import GenerationSettings
from pipeline.talking.answers import ImageTokens, SeenPart
from pipeline.talking.generation import generate_pictures, text_conditioning
from pipeline.talking.reading import read_contexts
from settings.params import Params

Method = Literal["generator", "gill"]
METHODS: dict[str, str] = {"generator": "generator alone", "gill": "GILL"}


@dataclass(frozen=True)
class PictureBatch:
    """Examples whose pictures are made together, wherever: pictures travel as references."""

    examples: tuple[Example, ...]
    method: Method
    first_seed: int
    """Of the first example; the others count on from it."""
    settings: GenerationSettings


class PictureMaker:
    """Has made what is not there yet; `seed` + i is the seed of example i.

    What `crew` makes is saved here alone, so a worker that dies leaves nothing half-written.
    """

    def __init__(
        self,
        crew: Crew,
        store: EvaluationStore,
        seed: int,
        read_prompt: Callable[[str], list[list[int]]],
    ) -> None:
        """`read_prompt`: what the generator's text encoder reads of a prompt (its `read`)."""
        self._crew, self._store, self._seed = crew, store, seed
        self._read_prompt = read_prompt

    def make(self, one: EvaluationSet, method: Method, settings: GenerationSettings) -> list[Path]:
        """The pictures of a set, in the order of its examples."""
        keys = [
            self._key(example, method, self._seed + index, settings)
            for index, example in enumerate(one.examples)
        ]
        size = settings.batch_size
        spans = [range(i, min(i + size, len(keys))) for i in range(0, len(keys), size)]
        todo = [s for s in spans if any(self._store.picture(method, keys[i]) is None for i in s)]
        batches = [
            PictureBatch(
                tuple(one.examples[i] for i in span), method, self._seed + span.start, settings
            )
            for span in todo
        ]
        what = f"{one.title}, {METHODS[method]}"
        with Meter(what, sum(map(len, todo)), "pictures") as meter:

            def save(made: tuple[int, list[Image.Image]]) -> None:
                first_seed, pictures = made
                for i, picture in enumerate(pictures, first_seed - self._seed):
                    self._store.save_picture(method, one.name, i, keys[i], picture)
                meter.add(len(pictures))

            if batches:
                self._crew(batches, save)
        paths = [self._store.picture(method, key) for key in keys]
        assert all(path is not None for path in paths)
        return [path for path in paths if path is not None]

    def _key(
        self, example: Example, method: Method, seed: int, settings: GenerationSettings
    ) -> str:
        """Of all that a picture depends on, but for the models; pictures count by content.

        The generator's own text encoder cuts long prompts, so that many rounds are like few.
        """
        read = (
            self._read_prompt(example.prompt)
            if method == "generator"
            else [_content_of_part(part) for part in example.context]
        )
        sampling = settings.model_dump(include={"steps", "guidance", "scheduler"})
        return key_for(read, seed, sampling)


class WorkerModels:
    """What a Gill has loaded, as a worker comes to use it: the baseline alone loads no language
    model."""

    def __init__(self, artifacts: Artifacts, params: Params) -> None:
        self._artifacts, self._checkpoint = artifacts, params.training.checkpoint
        self._device = set_up(params.run.device, params.run.threads)
        self._backbones = read_backbones(artifacts)

    @cached_property
    def model(self) -> MultimodalLanguageModel:
        """Language model and heads."""
        return load_model(self._artifacts, self._device, self._checkpoint)

    @cached_property
    def encoder(self) -> VisualEncoder:
        """The visual encoder."""
        return load_encoder(self._backbones, self._device)

    @cached_property
    def generator(self) -> ImageGenerator:
        """The image generator."""
        return load_generator(self._backbones, self._device)

    @cached_property
    def empty_prompt(self) -> Conditioning:
        """What the generator reads in place of an empty prompt."""
        return read_empty_prompt(self._artifacts, self.conditioner)

    def conditioner(self) -> TextConditioner:
        """The generator's own text encoder, loaded anew."""
        found = self._backbones.image_generator
        return load_text_conditioner(found.path, dtype=found.torch_dtype, device=self._device)


class PictureWorker:
    """PictureBatch -> (first seed, pictures)."""

    def __init__(self, models: Gill | WorkerModels) -> None:
        self._models = models
        # A diffusion pipeline keeps the state of one run; and while diffusers loads one, modules
        # that other threads make have no contents.
        self._alone = threading.Lock()

    def __call__(self, batch: PictureBatch) -> tuple[int, list[Image.Image]]:
        """Make the pictures of one batch; gives its number with them."""
        with self._alone:
            generator = self._models.generator
            if generator is None:
                raise StageError("no image generator is loaded")
            return batch.first_seed, generate_pictures(
                generator,
                self._conditioning(batch),
                self._models.empty_prompt,
                batch.settings,
                batch.first_seed,
            )

    def _conditioning(self, batch: PictureBatch) -> Conditioning:
        if batch.method == "generator":
            return text_conditioning(self._conditioner, [e.prompt for e in batch.examples])
        contexts = [opened(example.context) for example in batch.examples]
        hidden = read_contexts(self._models.model, self._models.encoder, contexts)
        return self._models.model.conditioning(hidden)

    @cached_property
    def _conditioner(self) -> TextConditioner:
        """The generator's own text side, loaded when the baseline first needs it."""
        if self._models.conditioner is None:
            raise StageError("the generator's own text encoder cannot be loaded")
        return self._models.conditioner()


def load_worker(artifacts: Artifacts, params: Params, heads: str) -> PictureWorker:
    """Called on every worker, once.

    Raises StageError where it sees other heads than those of the fingerprint `heads`.
    """
    checkpoint = artifacts.model / CHECKPOINTS[params.training.checkpoint]
    if fingerprint_heads(checkpoint) != heads:
        raise StageError(
            f"{checkpoint} on {socket.gethostname()} is not the file that is evaluated: all "
            "machines of a cluster need the same files"
        )
    return PictureWorker(WorkerModels(artifacts, params))


def picture_crew(gill: Gill, artifacts: Artifacts, params: Params, heads: str) -> Crew:
    """Who makes the pictures: this process with the models that it has, or workers."""
    make: Callable[[], PictureWorker] = partial(load_worker, artifacts, params, heads)
    if params.run.scheduler in ("single", "threads"):
        make = partial(PictureWorker, gill)
    return Crew(
        make, params.run.scale_out, versions=library_versions("torch", "diffusers", "transformers")
    )


def opened(context: Sequence[str | Picture | ImageTokens]) -> list[SeenPart]:
    """A context with its pictures decoded."""
    return [open_picture(part.reference) if isinstance(part, Picture) else part for part in context]


def _content_of_part(part: str | Picture | ImageTokens) -> str | dict[str, str]:
    if isinstance(part, ImageTokens):
        return {"image_tokens": ""}
    return part if isinstance(part, str) else {"picture": content_of(part.reference)}


@lru_cache(maxsize=200_000)
def content_of(reference: str) -> str:
    """A hash of a picture's bytes, taken once per run."""
    return hashlib.blake2b(read_picture(reference), digest_size=16).hexdigest()
