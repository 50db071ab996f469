"""Examples to click on: in the miniature's language, a chat model's with questions as well, or else
with pictures of the candidates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gill.artifacts import Artifacts
from gill.loading import Gill


@dataclass(frozen=True)
class Example:
    """What a click puts into the box: a text, and pictures by their paths."""

    text: str
    pictures: tuple[str, ...] = ()


def examples_of(artifacts: Artifacts, gill: Gill) -> list[Example]:
    """A handful, whose pictures exist."""
    held_out = sorted((artifacts.miniature / "images" / "test").glob("*.png"))[:40]
    if len(held_out) > 23 and gill.language_model.turns is not None:
        return [
            Example("What is the capital of France?"),
            Example("show me a big red ring in the sea."),
            Example("I would like to see a small yellow cross on the right in the desert."),
            Example("What is on this picture?", (str(held_out[8]),)),
            Example("Who painted the Mona Lisa?"),
            Example("it moves to the sea.", (str(held_out[23]),)),
        ]
    if len(held_out) > 23:
        return [
            Example("show me a big blue square on the left."),
            Example("draw a small yellow cross on the right in the sea."),
            Example("in the desert on the left there is a small red ring. it turns blue."),
            Example("in the sea on the left a small yellow cross.\nQ: what color is it? A:"),
            Example("it turns blue.", (str(held_out[8]),)),
            Example("it moves to the sea.", (str(held_out[23]),)),
        ]
    examples = [Example("a dog running on the beach"), Example("a red double-decker bus")]
    index = gill.index
    if index is not None and index.candidates is not None:
        images = index.candidates["image"].slice(0, 200).to_pylist()
        shown = [path for path in images if Path(path).is_file()][:2]
        questions = ("What is shown here?", "How would it look in winter?")
        examples += [Example(text, (path,)) for text, path in zip(questions, shown)]
    return examples
