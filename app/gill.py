"""A trained GILL to talk to: `Gill.load("artifacts")` puts together what the stages wrote.

>>> gill = Gill.load("artifacts")
>>> gill.reply(["what is this ?", Image.open("photo.png")])
[Text("..."), GeneratedImage(...)]
>>> gill.reply(["a red ring."], want="generate", candidates=4, steps=20, seed=7)
[GeneratedImage(...)]
>>> conversation = gill.conversation()
>>> for event in conversation.stream(["a red ring."], gill.settings(temperature=0.7)):
...     print(event)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from PIL import Image
from pydantic import ValidationError

from app.artifacts import Artifacts
from cache import open_store
from corpora.pictures import open_picture
from pipeline.backbones import Backbone, Backbones
from pipeline.checkpoint import BEST, LAST, load_heads
from pipeline.conversation import (
    Conversation,
    ConversationError,
    Likelihood,
    Part,
    Reply,
    ReplySettings,
    Speaker,
    log_likelihoods,
    reply_together,
)
from pipeline.decision import DecisionModel
from pipeline.evaluation import read_contexts
from pipeline.gill import Gill as GillModel
from pipeline.image_generator import ImageGenerator, load_image_generator
from pipeline.language_model import load_language_model
from pipeline.retrieval import Retrieved, load_index
from pipeline.settings import GenerationSettings
from pipeline.text_conditioner import Conditioning, load_text_conditioner
from pipeline.visual_encoder import VisualEncoder, load_visual_encoder

CHECKPOINTS = {"last": LAST, "best": BEST}
Checkpoint = Literal["last", "best"]


class GillError(Exception):
    """A model that cannot be put together, or a question it cannot take; the message says why."""


class Gill:
    """A loaded model; `reply` answers one turn, `conversation` begins a dialogue that remembers.

    Wherever `settings` are taken, single knobs may be given by name instead: see `settings`.
    """

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker

    @classmethod
    def load(
        cls,
        directory: str | Path = "artifacts",
        *,
        device: str = "auto",
        checkpoint: Checkpoint = "last",
    ) -> Gill:
        """Load everything below `directory`; the index and the decision model where they exist.

        Pictures are sampled as `generation` of the params file beside `directory` says, where there
        is one. What the manifest and the index name by a relative path is looked for in the working
        directory, then beside `directory`.

        Raises BackboneError, CheckpointError, RetrievalError, DecisionError or GillError, saying
        what is missing or does not fit together.
        """
        artifacts = Artifacts(Path(directory))
        place = pick_device(device)
        backbones = Backbones.read(artifacts.backbones)
        gill = load_model(artifacts, place, checkpoint)
        index = decision = None
        heads = fingerprint_heads(artifacts.model / CHECKPOINTS[checkpoint])
        if artifacts.index.is_dir():
            index = load_index(artifacts.index, heads=heads)
        if (artifacts.decision / "decision.json").is_file():
            decision = DecisionModel.load(artifacts.decision, heads=heads)
        beside = artifacts.root.parent
        generator = _found(backbones.image_generator, beside)
        return cls(
            Speaker(
                gill=gill,
                encoder=load_encoder(backbones, place, beside),
                generator=load_generator(backbones, place, beside),
                empty_prompt=read_empty_prompt(artifacts),
                index=index,
                decision=decision,
                open_picture=lambda reference: open_picture(_beside(reference, beside)),
                conditioner=functools.cache(
                    lambda: load_text_conditioner(
                        generator.path, dtype=generator.torch_dtype, device=place
                    )
                ),
                generation=read_generation(beside / "params.yaml"),
            )
        )

    def conversation(self) -> Conversation:
        """A new conversation."""
        return Conversation(self.speaker)

    def settings(self, base: ReplySettings | None = None, **knobs: Any) -> ReplySettings:
        """Reply settings with some knobs changed; None leaves a knob as it is.

        Knobs are the fields of ReplySettings (want, candidates, negative_prompt, seed),
        DecodingSettings (max_tokens, max_images, min_tokens_before_image, image_bias, temperature,
        top_k, top_p, repetition_penalty, stop_at_newline, stop_after_images) and
        GenerationSettings (steps, guidance, scheduler, batch_size).

        Raises GillError naming a knob that does not exist or a value that is not allowed.
        """
        base = base or ReplySettings()
        changed = {name: value for name, value in knobs.items() if value is not None}
        parts = {
            "decoding": base.decoding.model_dump(),
            "generation": (base.generation or self.speaker.generation).model_dump(),
        }
        whole = base.model_dump() | parts
        for name, value in changed.items():
            place = next((part for part in parts.values() if name in part), whole)
            if name not in place or name in parts:
                known = [n for section in parts.values() for n in section]
                known += [n for n in whole if n not in parts]
                raise GillError(f"there is no knob {name}; there are: {', '.join(sorted(known))}")
            place[name] = value
        try:
            return ReplySettings.model_validate(whole)
        except ValidationError as error:
            lines = [f"{e['loc'][-1]}: {e['msg']} (found {e['input']!r})" for e in error.errors()]
            raise GillError("; ".join(lines)) from None

    def reply(
        self, turn: Sequence[Part], settings: ReplySettings | None = None, **knobs: Any
    ) -> Reply:
        """Answer a turn that stands alone. Raises ConversationError and GillError."""
        return self.conversation().reply(turn, self.settings(settings, **knobs))

    def reply_batch(
        self, turns: Sequence[Sequence[Part]], settings: ReplySettings | None = None, **knobs: Any
    ) -> list[Reply]:
        """Answer turns that stand alone, together; each answer is what it would be alone."""
        chosen = self.settings(settings, **knobs)
        return reply_together([self.conversation().prepare(turn, chosen) for turn in turns])

    def caption(self, pictures: Sequence[Image.Image], max_tokens: int = 32) -> list[str]:
        """What is on each picture: greedy words after the picture alone, up to the first stop."""
        replies = self.reply_batch(
            [[picture] for picture in pictures], want="text", max_tokens=max_tokens
        )
        return [reply.text.split("\n")[0].split(".")[0].strip() for reply in replies]

    def retrieve(
        self, context: Sequence[Part], n: int = 1, exclude: Sequence[int] = ()
    ) -> list[Retrieved]:
        """The candidates closest to what the [IMG] tokens after `context` ask for, best first.

        Raises ConversationError without an index.
        """
        speaker = self.speaker
        if speaker.index is None:
            raise ConversationError("nothing to retrieve from: there is no candidate index")
        hidden = read_contexts(speaker.gill, speaker.encoder, [list(context)])
        with torch.no_grad():
            query = speaker.gill.text_query(hidden).float().cpu()
        return speaker.index.search(query, n, exclude=exclude)[0]

    def log_likelihoods(
        self, sequences: Sequence[Sequence[Part]], given: Sequence[Part] = ()
    ) -> list[Likelihood]:
        """How likely the words of each sequence are after `given`; see the function in pipeline."""
        return log_likelihoods(self.speaker, sequences, given)


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_generation(params: Path) -> GenerationSettings:
    """The `generation` section of a run's params file; the defaults where there is none.

    Raises GillError when the section is not one.
    """
    if not params.is_file():
        return GenerationSettings()
    try:
        raw = yaml.safe_load(params.read_text(encoding="utf-8"))
        return GenerationSettings.model_validate((raw or {}).get("generation") or {})
    except (yaml.YAMLError, ValidationError, AttributeError) as error:
        raise GillError(f"{params}: the section `generation` cannot be used: {error}") from None


def load_model(artifacts: Artifacts, device: torch.device, checkpoint: Checkpoint) -> GillModel:
    """The frozen language model with the trained heads, refusing heads of other backbones."""
    backbones = Backbones.read(artifacts.backbones)
    heads, _ = load_heads(
        artifacts.model / CHECKPOINTS[checkpoint], backbones=backbones.fingerprints
    )
    found = _found(backbones.language_model, artifacts.root.parent)
    language_model = load_language_model(found.path, dtype=found.torch_dtype, device=device)
    return GillModel(language_model, heads.to(device).eval())


def load_encoder(
    backbones: Backbones, device: torch.device, beside: Path = Path()
) -> VisualEncoder:
    """The visual encoder of the manifest."""
    encoder = _found(backbones.visual_encoder, beside)
    return load_visual_encoder(encoder.path, dtype=encoder.torch_dtype, device=device)


def load_generator(
    backbones: Backbones, device: torch.device, beside: Path = Path()
) -> ImageGenerator:
    """The image side of the generator of the manifest."""
    generator = _found(backbones.image_generator, beside)
    return load_image_generator(generator.path, dtype=generator.torch_dtype, device=device)


def read_empty_prompt(artifacts: Artifacts) -> Conditioning:
    """The empty prompt's conditioning, from the target store: classifier-free guidance needs it."""
    store = open_store(artifacts.targets)
    tensors = {name: torch.from_numpy(store.constant(name))[None] for name in store.spec.constants}
    return Conditioning(tensors["empty_embedding"], tensors.get("empty_pooled"))


def fingerprint_heads(path: Path) -> str:
    """SHA-256 of a checkpoint file: what an index was built with."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _found(backbone: Backbone, beside: Path) -> Backbone:
    """The backbone with its path where it lies, seen from here."""
    prefix, path = ("", backbone.path)
    if path.startswith("local-dir:"):
        prefix, path = "local-dir:", path.removeprefix("local-dir:")
    return backbone.model_copy(update={"path": prefix + _beside(path, beside)})


def _beside(reference: str, folder: Path) -> str:
    """A relative path as it is where it exists, else below `folder` where that exists."""
    there = folder / reference.split("#")[0]
    if Path(reference.split("#")[0]).exists() or not there.exists():
        return reference
    return str(folder / reference)
