"""A trained GILL to talk to: `Gill.load("artifacts")` puts together what the stages wrote.

>>> gill = Gill.load("artifacts")
>>> gill.reply(["what is this ?", Image.open("photo.png")])
[Text("..."), GeneratedImage(...)]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from app.artifacts import Artifacts
from cache import open_store
from corpora.pictures import open_picture
from pipeline.backbones import Backbones
from pipeline.checkpoint import BEST, LAST, load_heads
from pipeline.conversation import Answer, Conversation, Part, ReplySettings, Speaker
from pipeline.decision import DecisionModel
from pipeline.gill import Gill as GillModel
from pipeline.image_generator import ImageGenerator, load_image_generator
from pipeline.language_model import load_language_model
from pipeline.retrieval import load_index
from pipeline.text_conditioner import Conditioning
from pipeline.visual_encoder import VisualEncoder, load_visual_encoder

CHECKPOINTS = {"last": LAST, "best": BEST}
Checkpoint = Literal["last", "best"]


class Gill:
    """A loaded model; `reply` answers one turn, `conversation` begins a dialogue that remembers."""

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

        Raises BackboneError, CheckpointError or RetrievalError, saying what is missing or does not
        fit together.
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
        return cls(
            Speaker(
                gill=gill,
                encoder=load_encoder(backbones, place),
                generator=load_generator(backbones, place),
                empty_prompt=read_empty_prompt(artifacts),
                index=index,
                decision=decision,
                open_picture=open_picture,
            )
        )

    def conversation(self) -> Conversation:
        """A new conversation."""
        return Conversation(self.speaker)

    def reply(self, turn: Sequence[Part], settings: ReplySettings | None = None) -> list[Answer]:
        """Answer a turn that stands alone."""
        return self.conversation().reply(turn, settings)


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(artifacts: Artifacts, device: torch.device, checkpoint: Checkpoint) -> GillModel:
    """The frozen language model with the trained heads, refusing heads of other backbones."""
    backbones = Backbones.read(artifacts.backbones)
    heads, _ = load_heads(
        artifacts.model / CHECKPOINTS[checkpoint], backbones=backbones.fingerprints
    )
    language_model = load_language_model(
        backbones.language_model.path, dtype=backbones.language_model.torch_dtype, device=device
    )
    return GillModel(language_model, heads.to(device).eval())


def load_encoder(backbones: Backbones, device: torch.device) -> VisualEncoder:
    """The visual encoder of the manifest."""
    encoder = backbones.visual_encoder
    return load_visual_encoder(encoder.path, dtype=encoder.torch_dtype, device=device)


def load_generator(backbones: Backbones, device: torch.device) -> ImageGenerator:
    """The image side of the generator of the manifest."""
    generator = backbones.image_generator
    return load_image_generator(generator.path, dtype=generator.torch_dtype, device=device)


def read_empty_prompt(artifacts: Artifacts) -> Conditioning:
    """The empty prompt's conditioning, which guidance needs, from the target store."""
    store = open_store(artifacts.targets)
    tensors = {name: torch.from_numpy(store.constant(name))[None] for name in store.spec.constants}
    return Conditioning(tensors["empty_embedding"], tensors.get("empty_pooled"))


def fingerprint_heads(path: Path) -> str:
    """SHA-256 of a checkpoint file: what an index was built with."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
