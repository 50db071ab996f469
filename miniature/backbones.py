"""The shipped tiny backbones: three directories in the real formats, to use there or copy out."""

import shutil
from pathlib import Path
from typing import NamedTuple

from miniature.vocabulary import MAX_POSITIONS, TEXT_LENGTH

__all__ = [
    "GUIDANCE",
    "MAX_POSITIONS",
    "SAMPLING_STEPS",
    "SHIPPED",
    "TEXT_LENGTH",
    "Backbones",
    "unpack",
]

# How the tiny image generator is meant to be sampled (the scheduler, DPM-Solver++, is in its
# directory).
SAMPLING_STEPS = 12
GUIDANCE = 2.5


class Backbones(NamedTuple):
    """Where the three frozen parts of a GILL model are."""

    language_model: Path
    """For `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`: an OPT."""
    visual_encoder: Path
    """For open_clip, with `local-dir:` in front: model, preprocessing and tokenizer."""
    image_generator: Path
    """For `StableDiffusionPipeline.from_pretrained`."""

    @classmethod
    def within(cls, directory: Path) -> "Backbones":
        """The three directories under one, by their fixed names."""
        return cls(*(directory / name for name in cls._fields))


SHIPPED = Backbones.within(Path(__file__).parent / "weights")


def unpack(directory: Path) -> Backbones:
    """Copies the shipped backbones to a folder, into the places of `Backbones.within(directory)`.

    What lies in those three places before is replaced.

    Raises:
        FileNotFoundError: the installation lacks the weights.
    """
    target = Backbones.within(directory)
    for source, place in zip(SHIPPED, target):
        if not source.is_dir():
            raise FileNotFoundError(
                f"{source} is missing: the package was installed without its weights; "
                f"`python -m miniature.recipe --out DIR` trains them anew"
            )
        if place.exists():
            shutil.rmtree(place)
        shutil.copytree(source, place)
    return target
