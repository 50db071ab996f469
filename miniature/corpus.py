"""Draws a complete data set of the miniature world into a folder, in the real sets' file formats.

captions.tsv        caption, image, split: val and test show scenes that train never shows
candidates.tsv      caption, image: what to retrieve from, training pictures without a rare pair
images/SPLIT/       the pictures of both
stories.json        VIST story-in-sequence, with story_images/
dialogues.json      VisDial 1.0, with dialogue_images/
prompts.tsv         PartiPrompts; a good share names rare pairs, which no candidate shows
coco_captions.json  COCO captions of the test pictures
questions.json      VQAv2 questions about the test pictures; annotations.json has the answers
truth.json          the scene of every picture, story, dialogue and prompt, for the oracle
drawn.json          what was drawn, with which seed
"""

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from miniature.drawing import render
from miniature.language import (
    MOST,
    Round,
    caption,
    dialogue,
    picture_caption,
    story,
)
from miniature.world import ATTRIBUTES, SPLITS, Scene, Split, draw_scene

RARE_SHARE = 0.1  # of the pictures, stories and dialogues
_KIND_SHARES = {"Rare pairs": 0.4, "Common scenes": 0.4, "Held-out scenes": 0.2}
_CAPTIONS_PER_COCO_PICTURE = 5
_NUM_ANNOTATORS = 10


def draw(
    directory: Path,
    *,
    pictures: int = 6000,
    captions_per_picture: int = 2,
    held_out_pictures: int = 600,
    stories: int = 100,
    dialogues: int = 100,
    prompts: int = 300,
    seed: int = 0,
) -> Path:
    """Writes the files that the module's description lists, and returns the path of `captions.tsv`.

    A folder that an earlier call wrote is replaced.

    Args:
        directory: where to; created if need be.
        pictures: training pictures.
        captions_per_picture: captions of each picture, all different.
        held_out_pictures: pictures of each of the splits val and test.
        stories: stories, whose last picture shows a test scene.
        dialogues: dialogues about pictures of test scenes.
        prompts: prompts, all different.
        seed: everything is a function of it and of the sizes.

    Raises:
        FileExistsError: the folder holds something else.
    """
    sizes = {name: value for name, value in locals().items() if name != "directory"}
    _clear(directory)
    truth: dict[str, Any] = {"attributes": list(ATTRIBUTES)}
    counts: dict[Split, int] = {
        "train": pictures,
        "val": held_out_pictures,
        "test": held_out_pictures,
    }
    scenes = _draw_captioned(directory, counts, captions_per_picture, seed)
    truth["pictures"] = {
        image: list(scene) for part in scenes.values() for image, scene in part.items()
    }
    _draw_coco(directory, scenes["test"], seed)
    _draw_questions(directory, scenes["test"], seed)
    truth["stories"] = _draw_stories(directory, stories, seed)
    truth["dialogues"] = _draw_dialogues(directory, dialogues, seed)
    truth["prompts"] = _draw_prompts(directory, prompts, seed)
    _write_json(directory / "truth.json", truth)
    drawn = {
        "what": "the miniature world",
        **sizes,
        "rare_share": RARE_SHARE,
        "captions": (pictures + 2 * held_out_pictures) * captions_per_picture,
    }
    _write_json(directory / "drawn.json", drawn)
    return directory / "captions.tsv"


def _clear(directory: Path) -> None:
    if directory.exists() and any(directory.iterdir()):
        if not (directory / "drawn.json").is_file():
            raise FileExistsError(
                f"{directory} is not empty, and not a drawn corpus (it has no drawn.json): "
                f"choose another folder, or empty it"
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)


def _rng(seed: int, what: str) -> random.Random:
    return random.Random(f"{what} {seed}")


def _render_seed(seed: int, what: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{what} {seed}".encode(), digest_size=4).digest(), "big")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _write_table(path: Path, rows: Iterable[Sequence[str]]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def _write_pictures(paths: Sequence[Path], scenes: Sequence[Scene], seed: int) -> None:
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    for path, pixels in zip(paths, render(scenes, seed)):
        Image.fromarray(pixels).save(path, compress_level=1)


def _different_captions(
    scene: Scene, number: int, rng: random.Random, first_complete: bool
) -> list[str]:
    found = [caption(scene, rng)] if first_complete else []
    while len(found) < number:
        text = picture_caption(scene, rng)
        if text not in found:
            found.append(text)
    return found


# --- captioned pictures -------------------------------------------------------------------------


def _draw_captioned(
    directory: Path, counts: dict[Split, int], captions_per_picture: int, seed: int
) -> dict[Split, dict[str, Scene]]:
    """Writes captions.tsv, candidates.tsv and pictures; gives the scenes by split and picture path.

    The first caption of a val or test picture is complete, so that what it should show is known.
    """
    rows: list[tuple[str, str, str]] = []
    candidates: list[tuple[str, str]] = []
    scenes_of: dict[Split, dict[str, Scene]] = {}
    for split in SPLITS:
        rng = _rng(seed, f"captions {split}")
        scenes = [draw_scene(rng, split, RARE_SHARE) for _ in range(counts[split])]
        images = [f"images/{split}/{i:06d}.png" for i in range(len(scenes))]
        _write_pictures([directory / image for image in images], scenes, _render_seed(seed, split))
        scenes_of[split] = dict(zip(images, scenes))
        for image, scene in scenes_of[split].items():
            texts = _different_captions(scene, captions_per_picture, rng, split != "train")
            rows += [(text, image, split) for text in texts]
            if split == "train" and not scene.is_rare:
                candidates.append((texts[0], image))
    _write_table(directory / "captions.tsv", [("caption", "image", "split"), *rows])
    _write_table(directory / "candidates.tsv", [("caption", "image"), *candidates])
    return scenes_of


def _draw_coco(directory: Path, scenes: dict[str, Scene], seed: int) -> None:
    """Writes COCO captions: five of each test picture, the first complete, the others nearly so."""
    rng = _rng(seed, "coco captions")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (image, scene) in enumerate(scenes.items()):
        images.append({"id": i, "file_name": image, "width": 32, "height": 32})
        texts = [caption(scene, rng)]
        while len(texts) < _CAPTIONS_PER_COCO_PICTURE:
            texts.append(caption(scene, rng, MOST))
        annotations += [
            {"id": len(annotations) + j, "image_id": i, "caption": t} for j, t in enumerate(texts)
        ]
    content = {
        "info": {"description": "the miniature world"},
        "images": images,
        "annotations": annotations,
    }
    _write_json(directory / "coco_captions.json", content)


def _draw_questions(directory: Path, scenes: dict[str, Scene], seed: int) -> None:
    """Writes VQAv2 questions and annotations: a question about each test picture, all agreeing.

    Picture number n of `images/test` has image_id n.
    """
    rng = _rng(seed, "questions")
    questions, annotations = [], []
    for image_id, scene in enumerate(scenes.values()):
        asked = rng.choice(dialogue(scene, rng))
        identity = {"image_id": image_id, "question_id": 1000 * image_id}
        questions.append({**identity, "question": asked.question})
        answers = [
            {"answer": asked.answer, "answer_confidence": "yes", "answer_id": 1 + n}
            for n in range(_NUM_ANNOTATORS)
        ]
        annotations.append(
            {
                **identity,
                "question_type": " ".join(asked.question.split()[:2]),
                "answer_type": "yes/no" if asked.answer.split()[0] in ("yes", "no") else "other",
                "multiple_choice_answer": asked.answer,
                "answers": answers,
            }
        )
    head = {
        "info": {"description": "the miniature world", "version": "2.0"},
        "data_subtype": "test",
    }
    _write_json(
        directory / "questions.json",
        {**head, "task_type": "Open-Ended", "data_type": "mscoco", "questions": questions},
    )
    _write_json(
        directory / "annotations.json", {**head, "data_type": "mscoco", "annotations": annotations}
    )


# --- stories and dialogues ----------------------------------------------------------------------


def _draw_stories(directory: Path, number: int, seed: int) -> dict[str, list[list[str]]]:
    """Writes VIST stories and their pictures; gives the scenes of each story, by its id.

    `text` is not split into words as VIST's is, but the same as `original_text`.
    """
    rng = _rng(seed, "stories")
    told = {str(1 + i): story(rng, "test", rare_share=RARE_SHARE) for i in range(number)}
    images, albums, annotations = [], [], []
    for story_id, moments in told.items():
        album_id = f"9{story_id}"
        albums.append({"id": album_id, "title": f"story {story_id}", "description": ""})
        for order, moment in enumerate(moments):
            photo_id = f"{story_id}{order}"
            images.append(
                {"id": photo_id, "album_id": album_id, "title": "", "text": "", "tags": ""}
            )
            sentence = {
                "original_text": moment.caption,
                "album_id": album_id,
                "photo_flickr_id": photo_id,
                "setting": "first-2-pick-and-tell",
                "worker_id": "miniature",
                "story_id": story_id,
                "tier": "story-in-sequence",
                "worker_arranged_photo_order": order,
                "text": moment.caption,
                "storylet_id": photo_id,
            }
            annotations.append([sentence])
    content = {"images": images, "albums": albums, "annotations": annotations}
    _write_json(directory / "stories.json", content)
    _write_pictures(
        [directory / "story_images" / f"{image['id']}.png" for image in images],
        [moment.scene for moments in told.values() for moment in moments],
        _render_seed(seed, "stories"),
    )
    return {story_id: [list(m.scene) for m in moments] for story_id, moments in told.items()}


def _draw_dialogues(directory: Path, number: int, seed: int) -> dict[str, list[str]]:
    """Writes VisDial dialogues and their pictures; gives the scenes by image_id.

    The candidates of a round are all answers there are, which is fewer than VisDial's hundred, and
    the questions keep their question marks, which VisDial's lack.
    """
    rng = _rng(seed, "dialogues")
    scenes = {1 + i: draw_scene(rng, "test", RARE_SHARE) for i in range(number)}
    questions: dict[str, int] = {}
    answers: dict[str, int] = {}
    dialogs = []
    for image_id, scene in scenes.items():
        rounds = dialogue(scene, rng)
        dialogs.append((image_id, picture_caption(scene, rng), rounds))
        for one in rounds:
            questions.setdefault(one.question, len(questions))
            answers.setdefault(one.answer, len(answers))

    def written(one: Round) -> dict[str, Any]:
        options = rng.sample(range(len(answers)), len(answers))
        answer = answers[one.answer]
        return {
            "question": questions[one.question],
            "answer": answer,
            "gt_index": options.index(answer),
            "answer_options": options,
        }

    content = {
        "version": "1.0",
        "split": "val2018",
        "data": {
            "questions": list(questions),
            "answers": list(answers),
            "dialogs": [
                {"image_id": image_id, "caption": text, "dialog": [written(one) for one in rounds]}
                for image_id, text, rounds in dialogs
            ],
        },
    }
    _write_json(directory / "dialogues.json", content)
    folder = directory / "dialogue_images"
    _write_pictures(
        [folder / f"VisualDialog_val2018_{image_id:012d}.png" for image_id in scenes],
        list(scenes.values()),
        _render_seed(seed, "dialogues"),
    )
    return {str(image_id): list(scene) for image_id, scene in scenes.items()}


# --- prompts ------------------------------------------------------------------------------------


def _draw_prompts(directory: Path, number: int, seed: int) -> list[list[str]]:
    """Writes PartiPrompts: complete captions of three kinds of scenes; gives the scenes in order.

    The category is the kind: a rare pair, which no candidate shows; a common training scene,
    which candidates may show; or a held-out scene with a common pair, which no candidate shows
    either.
    """
    rng = _rng(seed, "prompts")
    prompts: dict[str, tuple[str, Scene]] = {}
    while len(prompts) < number:
        kind = rng.choices(list(_KIND_SHARES), list(_KIND_SHARES.values()))[0]
        if kind == "Rare pairs":
            scene = draw_scene(rng, None, rare_share=1.0)
        else:
            scene = draw_scene(rng, "train" if kind == "Common scenes" else "test", rare_share=0.0)
        prompts.setdefault(caption(scene, rng), (kind, scene))
    rows = [
        (text, kind, "Imagination" if kind == "Rare pairs" else "Basic", " ".join(scene))
        for text, (kind, scene) in prompts.items()
    ]
    _write_table(directory / "prompts.tsv", [("Prompt", "Category", "Challenge", "Note"), *rows])
    return [list(scene) for _, scene in prompts.values()]
