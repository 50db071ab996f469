"""The shipped tiny backbones: three directories in the real formats."""

from pathlib import Path
from typing import NamedTuple


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
