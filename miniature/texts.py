"""What the tiny language model is trained on: texts about training scenes, and their tokens.

Captions, stories, dialogues and requests. Many end with a summary in words of what they
established, which teaches the model to collect it; names in a summary are often left without their
value, so that what is known of an attribute is read from the text and not from the summary so far.

Illustrated texts have pictures in the places where GILL puts them: before a caption, before the
beginning of a text (Eq. 1), between the captions of a story, before questions. In place of a
picture stand the words of what it shows, so that the model is at home with a picture in mid-text.
"""

import itertools
import random
import re
from typing import NamedTuple

from transformers import GPT2Tokenizer

from miniature.language import (
    CHANGEABLE,
    LITTLE,
    MOST,
    PICTURE_MARKS,
    SUMMARY_ORDER,
    Mention,
    caption,
    dialogue,
    dialogue_prompt,
    opening_request,
    picture_caption,
    picture_words,
    request,
    stated,
    story,
    story_prompt,
    summary,
)
from miniature.world import ATTRIBUTES, Scene, draw_scene

BEGIN = "</s>"  # begins a text, unless a picture stands before it

# --- texts --------------------------------------------------------------------------------------


def first_document(rng: random.Random) -> str:
    """A caption and its whole summary: where it is easiest to see that one repeats the other."""
    scene = draw_scene(rng, "train")
    text = caption(scene, rng, MOST)
    known = stated(text)
    return text + summary(
        scene, rng.sample(SUMMARY_ORDER, len(SUMMARY_ORDER)), {*ATTRIBUTES} - known
    )


def document(rng: random.Random) -> str:
    """One training text about training scenes."""
    kind = rng.choices(("captions", "story", "dialogue", "requests"), (25, 30, 33, 12))[0]
    if kind == "captions":
        scene = draw_scene(rng, "train")
        number = rng.choice((1, 1, 2, 3))
        text = story_prompt([picture_caption(scene, rng) for _ in range(number)])
    elif kind == "story":
        mention = rng.choice((LITTLE, Mention(0.6, 0.6, 0.6, 0.6)))
        moments = story(rng, "train", rng.choice((2, 3, 4, 5, 5)), rng.choice((2, 3, 4)), mention)
        scene, text = moments[-1].scene, story_prompt([moment.caption for moment in moments])
    elif kind == "dialogue":
        scene = draw_scene(rng, "train")
        text = dialogue_prompt(dialogue(scene, rng)[: rng.choice((1, 3, 5, 7, 10, 10))])
    else:
        scene, text = _requests(rng)
    if kind != "dialogue" and rng.random() < 0.25:
        text += _questions(text, scene, rng)
    if rng.random() < (0.6 if kind == "captions" else 0.85):
        text += _summary_of_stated(text, scene, rng)
    return text


def _requests(rng: random.Random) -> tuple[Scene, str]:
    moments = story(rng, "train", rng.choice((1, 2, 3, 4)), rng.choice((2, 3, 4)))
    texts = [opening_request(moments[0].scene, rng)]
    for before, after in itertools.pairwise(moments):
        texts.append(request(after.scene, _changed(before.scene, after.scene), rng))
    return moments[-1].scene, " ".join(texts)


def _changed(before: Scene, after: Scene) -> str:
    return next(name for name in CHANGEABLE if getattr(before, name) != getattr(after, name))


def _questions(about: str, scene: Scene, rng: random.Random) -> str:
    """Questions that a text answers, and the answers."""
    known = stated(about)
    askable = [r for r in dialogue(scene, rng) if stated(f"Q: ? A: {r.answer}") <= known]
    asked = askable[: rng.choice((1, 1, 2, 3))]
    return "\n" + dialogue_prompt(asked) if asked else ""


def _summary_of_stated(text: str, scene: Scene, rng: random.Random) -> str:
    known = stated(text)
    order = list(SUMMARY_ORDER)
    if rng.random() < 0.5:
        rng.shuffle(order)
    named = [name for name in order if rng.random() < (0.9 if name in known else 0.5)]
    blank = [name for name in named if name not in known or rng.random() < 0.3]
    return summary(scene, named, blank)


def illustrated_document(rng: random.Random) -> str:
    """A text with pictures, or one without; `picture_words` stand for each picture."""
    kind = rng.choices(("plain", "pairs", "story", "dialogue"), (40, 22, 28, 10))[0]
    if kind == "plain":
        return document(rng)
    if kind == "pairs":
        scene, text, about = _pictures_with_captions(rng)
    elif kind == "story":
        scene, text = _illustrated_story(rng)
        about = text
    else:
        scene = draw_scene(rng, "train")
        rounds = dialogue_prompt(dialogue(scene, rng)[: rng.choice((1, 2, 3, 5, 10))])
        about = picture_words(scene, rng)
        text = about + rng.choice(("", "\n", BEGIN)) + rounds
    if kind != "dialogue" and rng.random() < 0.25:
        text += _questions(about, scene, rng)
    if rng.random() < 0.85:
        text += _summary_of_stated(about, scene, rng)
    return text


def _illustrated_story(rng: random.Random) -> tuple[Scene, str]:
    """A story with pictures, and sometimes complete descriptions, between its captions."""
    mention = rng.choice((LITTLE, Mention(0.6, 0.6, 0.6, 0.6)))
    moments = story(rng, "train", rng.choice((2, 3, 4, 5, 5)), rng.choice((2, 3, 4)), mention)
    shown, described = rng.choice((0.3, 1.0)), rng.choice((0.0, 0.0, 0.3))
    text = ""
    for moment in moments:
        text += " " if text and not text.endswith(PICTURE_MARKS) else ""
        text += moment.caption
        if rng.random() < described:
            text += " " + caption(moment.scene, rng)
        # Most end with a caption, so that what the pictures told must be brought up to date.
        if rng.random() < (shown if moment is not moments[-1] else 0.2):
            text += picture_words(moment.scene, rng)
    return moments[-1].scene, text


def _pictures_with_captions(rng: random.Random) -> tuple[Scene, str, str]:
    """Pictures of different scenes, each before its caption; and the last of them by itself."""
    text = ""
    for _ in range(rng.choice((1, 1, 2, 3))):
        scene = draw_scene(rng, "train")
        last = picture_words(scene, rng)
        if not text and rng.random() < 0.5:
            last += BEGIN
        if rng.random() < 0.85:
            last += picture_caption(scene, rng)
        text += last
    return scene, text, last


# --- tokens -------------------------------------------------------------------------------------


class Read(NamedTuple):
    """A text in tokens; `of_picture` says which of them stand for a picture."""

    ids: list[int]
    of_picture: list[bool]


def read(tokenizer: GPT2Tokenizer, text: str) -> Read:
    """`</s>` begins a text, or follows its first picture where `BEGIN` stands there.

    `PICTURE_MARKS` only part a text: words begin anew after them.
    """
    found = Read([], [])
    pieces = re.split("[" + "".join(PICTURE_MARKS) + "]", text if BEGIN in text else BEGIN + text)
    for number, piece in enumerate(pieces):
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        found.ids.extend(ids)
        found.of_picture.extend([number % 2 == 1] * len(ids))
    return found
