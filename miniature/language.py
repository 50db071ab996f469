"""What is said about scenes: captions, events, stories, dialogues, requests, and summaries.

Captions name place and side before the object, because the image generator's text encoder is
causal: what comes later in a text is known at later positions only. `story_prompt` and
`dialogue_prompt` are the forms in which the language model was trained on longer texts, so
evaluation builds its prompts with them.
"""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from corpora.prompts import dialogue_prompt as dialogue_prompt
from corpora.prompts import story_prompt as story_prompt
from miniature.world import ATTRIBUTES, SCENES, SCENES_OF, VALUES, Scene, Split, draw_scene

# The order in which a summary in words goes through the attributes.
SUMMARY_ORDER = ("shape", "color", "size", "side", "place")

# In the language model's texts, what stands where a picture was; the marks themselves are not read.
PICTURE_MARKS = ("{", "}")

CHANGEABLE = ("place", "color", "size", "side")  # what an event can change


_NO_WORD = str.maketrans(dict.fromkeys((".", "?", *PICTURE_MARKS), " "))


class Mention(NamedTuple):
    """The probabilities with which a caption mentions each attribute; it always names the shape."""

    place: float
    color: float
    size: float
    side: float


EVERYTHING = Mention(1.0, 1.0, 1.0, 1.0)
MOST = Mention(place=0.85, color=0.9, size=0.75, side=0.85)
LITTLE = Mention(place=0.35, color=0.35, size=0.35, side=0.35)


class Moment(NamedTuple):
    """One picture of a story and its caption."""

    scene: Scene
    caption: str


class Round(NamedTuple):
    """One round of a dialogue."""

    question: str
    answer: str


def as_predicate(attribute: str, value: str) -> str:
    """For example `in the desert`, `on the left` (but `in the middle`), `a ring`, `red`, `big`."""
    match attribute, value:
        case ("place", _) | ("side", "middle"):
            return f"in the {value}"
        case "side", _:
            return f"on the {value}"
        case "shape", _:
            return f"a {value}"
    return value


def noun_phrase(scene: Scene, rng: random.Random, article: str, color: float, size: float) -> str:
    """For example `a small red ring`; `color` and `size` are the probabilities of their mention."""
    words = [article]
    if rng.random() < size:
        words.append(scene.size)
    if rng.random() < color:
        words.append(scene.color)
    return " ".join([*words, scene.shape])


def caption(scene: Scene, rng: random.Random, mention: Mention = EVERYTHING) -> str:
    """Describes a picture, for example `in the desert on the left there is a small red ring.`"""
    where = []
    if rng.random() < mention.place:
        where.append(as_predicate("place", scene.place))
    if rng.random() < mention.side:
        where.append(as_predicate("side", scene.side))
    rng.shuffle(where)
    if rng.random() < 0.3:
        where.append("there is")
    return " ".join([*where, noun_phrase(scene, rng, "a", mention.color, mention.size)]) + "."


def event(scene: Scene, attribute: str, name: str, rng: random.Random) -> str:
    """Tells that an attribute has become what it is in `scene`: for example `it turns blue.`"""
    match attribute:
        case "place":
            return f"{name} {rng.choice(('goes', 'moves'))} to the {scene.place}."
        case "color":
            return f"{name} {rng.choice(('turns', 'becomes'))} {scene.color}."
        case "size":
            return f"{name} becomes {scene.size}."
        case "side":
            return f"{name} moves to the {scene.side}."
    raise ValueError(f"an event changes one of {CHANGEABLE}, not {attribute!r}")


def picture_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as collections have them: most describe, some tell an event, few say all."""
    if rng.random() < 0.7:
        return caption(scene, rng, MOST)
    changed = rng.choice(CHANGEABLE)
    # What changes is told by the event: the name must not tell it before.
    color, size = 0.4 * (changed != "color"), 0.3 * (changed != "size")
    name = noun_phrase(scene, rng, rng.choice(("a", "the")), color, size)
    return event(scene, changed, name, rng)


def picture_words(scene: Scene, rng: random.Random) -> str:
    """What a text on the web holds in place of a picture, for example `{ red left small sea ring}`.

    The values of all attributes in any order, between `PICTURE_MARKS`.
    """
    before, after = PICTURE_MARKS
    return before + "".join(f" {value}" for value in rng.sample(scene, len(scene))) + after


def story(
    rng: random.Random,
    split: Split | None = None,
    num_pictures: int = 5,
    num_changing: int = 2,
    mention: Mention = LITTLE,
    rare_share: float | None = None,
) -> list[Moment]:
    """A story: its first caption says little, each later one tells the one attribute that changed.

    Args:
        rng: source of chance.
        split: "train" keeps every picture to training scenes; "val" and "test" take the last
            picture's scene from that split and the others from anywhere; None does not care.
        num_pictures: number of pictures, each with one caption.
        num_changing: how many attributes change in the course of the story; never the same
            one twice in a row.
        mention: what the first caption mentions.
        rare_share: the probability that the first scene has a rare colour-shape pair, as in
            `draw_scene`.

    Raises:
        ValueError: fewer than two attributes that change.
    """
    if not 2 <= num_changing <= len(CHANGEABLE):
        raise ValueError(f"num_changing must be 2 to {len(CHANGEABLE)}, got {num_changing}")
    allowed = frozenset(SCENES if split is None else SCENES_OF[split])
    # Drawn whole and rejected: steering the changes to allowed scenes would favour some.
    while True:
        scene = draw_scene(rng, "train" if split == "train" else None, rare_share)
        changing = rng.sample(CHANGEABLE, num_changing)
        moments = [Moment(scene, caption(scene, rng, mention))]
        last_changed = None
        while len(moments) < num_pictures:
            attribute = rng.choice([name for name in changing if name != last_changed])
            value = rng.choice([v for v in VALUES[attribute] if v != getattr(scene, attribute)])
            scene = scene._replace(**{attribute: value})
            last_changed = attribute
            # The name says the shape alone, which no event changes: all else is to be remembered.
            name = "it" if rng.random() < 0.5 else f"the {scene.shape}"
            moments.append(Moment(scene, event(scene, attribute, name, rng)))
        must_be_allowed = moments if split == "train" else moments[-1:]
        if all(moment.scene in allowed for moment in must_be_allowed):
            return moments


def dialogue(scene: Scene, rng: random.Random, num_rounds: int = 10) -> list[Round]:
    """Questions and answers about a picture: one question per attribute, the others are guesses.

    The answer "no" is informative (`no it is blue`), so that no round is wasted.
    """
    yes_no = "yes" if scene.size == "big" else "no"
    rounds = [
        Round("what is this?", f"a {scene.shape}"),
        Round("what color is it?", scene.color),
        Round("is it big?", f"{yes_no} it is {scene.size}"),
        Round("which side is it on?", as_predicate("side", scene.side)),
        Round("what place is it in?", as_predicate("place", scene.place)),
    ]
    rng.shuffle(rounds)
    while len(rounds) < num_rounds:
        attribute = rng.choice(ATTRIBUTES)
        guess = rng.choice(VALUES[attribute])
        truth = getattr(scene, attribute)
        answer = "yes" if guess == truth else f"no it is {as_predicate(attribute, truth)}"
        rounds.append(Round(f"is it {as_predicate(attribute, guess)}?", answer))
    rng.shuffle(rounds)
    return rounds[:num_rounds]


def request(scene: Scene, attribute: str, rng: random.Random) -> str:
    """Asks for a change, for example `make it blue.` or `move it to the left.`"""
    if attribute in ("place", "side"):
        return f"move it to the {getattr(scene, attribute)}."
    return f"{rng.choice(('make it', 'now it is'))} {getattr(scene, attribute)}."


def opening_request(scene: Scene, rng: random.Random, mention: Mention = LITTLE) -> str:
    """Asks for a picture, for example `show me a small red ring on the left.`"""
    verb = rng.choice(("show me", "draw", "show me a picture of"))
    parts = [verb, noun_phrase(scene, rng, "a", mention.color, mention.size)]
    if rng.random() < mention.side:
        parts.append(as_predicate("side", scene.side))
    if rng.random() < mention.place:
        parts.append(as_predicate("place", scene.place))
    return " ".join(parts) + "."


def question_prompt(context: str, question: str) -> str:
    """A question up to its `A:`, after a text (or nothing, if the context is a picture)."""
    return f"{context}\nQ: {question} A:" if context else f"Q: {question} A:"


def stated(text: str) -> frozenset[str]:
    """The attributes that a caption, story or dialogue of one object has established, by name.

    A question alone establishes nothing, except that a guess answered "yes" is right.
    """
    known: set[str] = set()
    for line in text.split("\n"):
        question, separator, answer = line.partition("? A: ")
        # "yes" makes the guess true; any other answer says what is so, and its question nothing.
        said = question + " " + answer if answer == "yes" else (answer if separator else line)
        words = set(said.translate(_NO_WORD).split())
        known.update(name for name, values in VALUES.items() if words & set(values))
    return frozenset(known)


def told_values(text: str) -> dict[str, str]:
    """What captions of one object, one after the other, have said of it so far: attribute to value,
    as it was said last.

    told_values("a red ring. it turns blue.")  ->  {"color": "blue", "shape": "ring"}
    """
    told: dict[str, str] = {}
    for word in text.translate(_NO_WORD).split():
        told.update({name: word for name, values in VALUES.items() if word in values})
    return told


def summary(scene: Scene, attributes: Sequence[str], blank: Iterable[str] = ()) -> str:
    """Says in words what a picture shows, for example ` picture: shape ring color red.`

    Args:
        scene: what is shown.
        attributes: which attributes the summary goes through, in this order.
        blank: those of them of which only the name is said, not the value.
    """
    empty = frozenset(blank)
    parts = [name if name in empty else f"{name} {getattr(scene, name)}" for name in attributes]
    return " picture: " + " ".join(parts) + "."


def words() -> list[str]:
    """Every word that the functions above use, without punctuation, each once."""
    said = """a the on in there is it goes moves turns becomes to and
        Q A what this color which side place yes no picture shape size
        show me draw of make move now"""
    values = [value for options in VALUES.values() for value in options]
    return list(dict.fromkeys([*said.split(), *values]))
