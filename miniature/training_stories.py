"""Draws stories to train on, which the world's own (`miniature.corpus`) are kept from.

    python -m miniature.training_stories FOLDER --stories 1000 --seed 77

stories.json    VIST story-in-sequence: every scene is a training scene
stories.jsonl   the same as documents whose pictures have complete captions of their own
pictures/       the pictures of both
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from miniature.drawing import render
from miniature.language import caption, story


def draw_training_stories(folder: Path, number: int, seed: int) -> Path:
    """Write the files above; gives the path of stories.jsonl."""
    rng = random.Random(f"training stories {seed}")
    told = [story(rng, "train", num_changing=rng.choice((2, 3, 4))) for _ in range(number)]
    moments = [moment for one in told for moment in one]
    names = [f"{place:06d}" for place in range(len(moments))]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, pixels in zip(names, render([moment.scene for moment in moments], seed)):
        Image.fromarray(pixels).save(folder / "pictures" / f"{name}.png", compress_level=1)
    annotations, documents = [], []
    left = iter(names)
    for story_id, one in enumerate(told, 1):
        parts: list[dict[str, str]] = []
        for order, (moment, name) in enumerate(zip(one, left)):
            sentence = {
                "story_id": str(story_id),
                "worker_arranged_photo_order": order,
                "photo_flickr_id": name,
                "text": moment.caption,
                "storylet_id": name,
            }
            annotations.append([sentence])
            picture = {"image": f"pictures/{name}.png", "caption": caption(moment.scene, rng)}
            parts += [{"text": moment.caption}, picture]
        documents.append(json.dumps(parts) + "\n")
    vist = {"images": [{"id": name} for name in names], "annotations": annotations}
    (folder / "stories.json").write_text(json.dumps(vist) + "\n", encoding="utf-8")
    (folder / "stories.jsonl").write_text("".join(documents), encoding="utf-8")
    return folder / "stories.jsonl"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m miniature.training_stories")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=77)
    options = parser.parse_args(arguments)
    print(draw_training_stories(options.folder, options.stories, options.seed))


if __name__ == "__main__":
    main()
