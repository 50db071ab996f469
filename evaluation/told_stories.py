"""Stories told: pictures behind the sentences of held-out stories, and of what the model adds.

Ours; the paper generates the last picture of a story alone. Story n of the set gets 3, 4 or 5
pictures in turn, in the places that `gill tell` gives them (`pipeline.talking.telling`). A picture
is made from all that was told before it, once from the words alone (`told`), once with the story's
own pictures before it read back (`told_pictures`), as `talking.read_back` has them if it has them,
otherwise by their visual vectors; the generator alone reads the words. Then the
first sentence alone is given, and the model goes on for four sentences, with pictures where it says
[IMG1] (`told_on`).

    places_right     of the places where the model says [IMG1], asked behind every token, the share
                     behind the end of a sentence
    places_found     share of the sentences behind which it says so
    stated_attributes   of the attributes that the story has stated so far, the share that the
                     oracle reads off the picture
    right_sentence   share of the pictures that fit the state of the world at their own sentence
                     better than at any other at which it differs, by the attributes stated so far
    kept_attributes  of the attributes that are not stated yet, the share that are as in the picture
                     before: whether a story keeps its looks

Pictures with the same place in the order have the same seed in all three.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from corpora.pictures import open_picture
from corpora.prompts import story_prompt
from corpora.records import Story
from evaluation.ceilings import oracle_ceiling
from evaluation.pictures import Method
from evaluation.results import Record, Result
from evaluation.scores import PictureScorer, Rows
from evaluation.sets import EvaluationSet, Example, Picture
from evaluation.sources import Source
from gill.loading import Gill
from miniature import oracle
from miniature.language import told_values
from miniature.world import ATTRIBUTES, VALUES, Scene
from pipeline.talking.answers import ImageTokens
from pipeline.talking.context import Context
from pipeline.talking.decoding import DecodingSettings, ImagePiece, TextPiece, decode
from pipeline.talking.telling import (
    LONGEST_SENTENCE,
    TellingSettings,
    image_preferences,
    picture_places,
)
from settings.evaluation import EvaluationParams

ADDED_SENTENCES = 4
Make = Callable[[EvaluationSet, Method, int], list[Path]]
"""Makes the pictures of a set by a method, the first with this seed above `evaluation.seed`."""


@dataclass(frozen=True)
class Place:
    """Where a picture of a story stands, and what is told up to there."""

    story: str
    order: int
    """Of the story's pictures it is this one, from 0."""
    words: tuple[str, ...]
    """Sentences since the picture before."""
    told: str
    """All words so far."""
    real: str = ""
    scene: Scene | None = None
    others: tuple[Scene, ...] = ()
    """The scenes of the story's other sentences."""


@dataclass
class ToldStories:
    """What was measured."""

    results: list[Result] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def tell_stories(
    gill: Gill,
    source: Source[Story],
    section: EvaluationParams,
    make: Make,
    scorer: PictureScorer,
) -> ToldStories:
    """Tell the first `section.told_stories` stories in all three ways, and score them."""
    stories = source.examples[: section.told_stories]
    places = [place for n, story in enumerate(stories) for place in _given(gill, source, story, n)]
    places.sort(key=lambda place: place.order)  # in rounds: a picture after those before it
    words = [_example(place, (place.told,)) for place in places]
    one = EvaluationSet("told", "Stories told", words, len(places))
    methods = section.methods
    made: dict[str, list[Path]] = {method: make(one, method, 0) for method in methods}
    told = ToldStories()
    told.results += _score(one, places, made, section, scorer)
    if gill.language_model.turns is None:
        told.results += _score_places(gill, stories, one, source.of, section)
    told.records += _records(one, places, made)
    if "gill" not in methods:
        return told
    shown = replace(one, name="told_pictures", title="Stories told, own pictures read back")
    with_tokens = gill.talking.read_back == "image_tokens_and_picture"
    read_back = _with_own_pictures(places, make, shown, with_tokens)
    paths = {"gill": [path for _, path in read_back]}
    told.results += _score(one, places, paths, section, scorer, shown)
    told.records += _records(replace(shown, examples=[e for e, _ in read_back]), places, paths)
    if gill.language_model.turns is not None:  # it continues no text
        return told
    return _go_on(gill, stories, section, make, told)


def _given(gill: Gill, source: Source[Story], story: Story, number: int) -> list[Place]:
    """The places of a story's pictures; of stories whose truth is known, with their scenes."""
    sentences = story.captions
    chosen = picture_places(gill, sentences, TellingSettings(pictures=3 + number % 3))
    scenes = source.moments.get(story.id, ())
    places, begin = [], 0
    for order, place in enumerate(chosen):
        real = story.pictures[place].image
        assert real is not None, "stories are read with their pictures"
        places.append(
            Place(
                story.id,
                order,
                tuple(sentences[begin : place + 1]),
                story_prompt(sentences[: place + 1]),
                real,
                scenes[place] if scenes else None,
                (*scenes[:place], *scenes[place + 1 :]),
            )
        )
        begin = place + 1
    return places


def _example(place: Place, context: tuple[str | Picture | ImageTokens, ...]) -> Example:
    return Example(f"{place.story}:{place.order}", context, place.told, place.real, place.scene)


def _with_own_pictures(
    places: Sequence[Place], make: Make, one: EvaluationSet, with_tokens: bool
) -> list[tuple[Example, Path]]:
    """Round by round, the pictures of each story in the context of its next one."""
    contexts: dict[str, tuple[str | Picture | ImageTokens, ...]] = {}
    tokens = (ImageTokens(),) if with_tokens else ()
    found: list[tuple[Example, Path]] = []
    for _, group in itertools.groupby(places, key=lambda place: place.order):
        examples = []
        for place in group:
            context = (*contexts.get(place.story, ()), story_prompt(place.words))
            contexts[place.story] = context
            examples.append(_example(place, context))
        paths = make(replace(one, examples=examples), "gill", len(found))
        for example, path in zip(examples, paths, strict=True):
            contexts[example.id.rpartition(":")[0]] += (*tokens, Picture(str(path)))
            found.append((example, path))
    return found


def _score(
    one: EvaluationSet,
    places: Sequence[Place],
    made: dict[str, list[Path]],
    section: EvaluationParams,
    scorer: PictureScorer,
    shown: EvaluationSet | None = None,
) -> list[Result]:
    """`one` reads words alone: what these tell is the ceiling in either case."""
    shown = shown or one
    rows = Rows(shown.name, shown.title, len(places), one.of, section.seed)
    results = []
    for method, found in scorer.score(one, made).items():
        if all(place.scene is not None for place in places):
            found.values |= told_scores(places, made[method])
        for row in rows.results(method, found):
            ceiling = oracle_ceiling(one, method) if row.metric == "oracle_attributes" else None
            if row.metric in ("stated_attributes", "right_sentence"):
                ceiling = 1.0  # all that they need was told
            results.append(replace(row, ceiling=ceiling))
    return results


def told_scores(places: Sequence[Place], pictures: Sequence[Path]) -> dict[str, list[float]]:
    """Per picture the shares of which the module speaks; a picture with nothing to judge has none.

    `right_sentence` needs the scenes of the story.
    """
    read = oracle.read_scenes([open_picture(path) for path in pictures])
    before: dict[str, dict[str, str]] = {}
    scores: dict[str, list[float]] = {}
    for place, codes in zip(places, read, strict=True):
        seen = {
            name: VALUES[name][code] if code != oracle.UNKNOWN else ""
            for name, code in zip(ATTRIBUTES, codes.tolist(), strict=True)
        }
        told = told_values(place.told)
        stated = [seen[name] == value for name, value in told.items()]
        if stated:
            scores.setdefault("stated_attributes", []).append(sum(stated) / len(stated))
        if place.scene is not None:
            scores.setdefault("right_sentence", []).append(_is_in_place(place, seen, list(told)))
        unstated = [name for name in ATTRIBUTES if name not in told]
        if (last := before.get(place.story)) is not None and unstated:
            kept = [seen[name] == last[name] for name in unstated]
            scores.setdefault("kept_attributes", []).append(sum(kept) / len(kept))
        before[place.story] = seen
    return scores


def _is_in_place(place: Place, seen: dict[str, str], stated: Sequence[str]) -> float:
    def fit(scene: Scene) -> int:
        return sum(seen[name] == getattr(scene, name) for name in stated)

    own = place.scene
    assert own is not None
    differing = [
        scene
        for scene in place.others
        if any(getattr(scene, name) != getattr(own, name) for name in stated)
    ]
    return float(all(fit(own) > fit(scene) for scene in differing))


def _score_places(
    gill: Gill, stories: Sequence[Story], one: EvaluationSet, of: int, section: EvaluationParams
) -> list[Result]:
    right: list[float] = []
    ends_found: list[float] = []
    for story in stories:
        says = [preference > 0 for preference in image_preferences(gill, story.captions)]
        ends = sum(int(one[-1]) for one in says)
        ends_found.append(ends / len(says))
        if said := sum(int(one.sum()) for one in says):
            right.append(ends / said)
    rows = Rows(one.name, one.title, len(stories), of, section.seed)
    results = [rows.mean("gill", "places_found", ends_found)]
    if right:
        results.append(rows.mean("gill", "places_right", right))
    return [replace(row, ceiling=1.0) for row in results]


def _go_on(
    gill: Gill, stories: Sequence[Story], section: EvaluationParams, make: Make, told: ToldStories
) -> ToldStories:
    """The first sentence of each story, continued greedily: words are read back, pictures not."""
    settings = DecodingSettings(
        max_tokens=ADDED_SENTENCES * LONGEST_SENTENCE,
        max_sentences=ADDED_SENTENCES,
        max_images=ADDED_SENTENCES + 1,
        words_between_images=True,
        read_back="nothing",
    )
    model = gill.model
    beginnings = [story.captions[0] for story in stories]
    prompts = [torch.cat([gill.start(), gill.embed([text])[0][1]]) for text in beginnings]
    answers = decode(model, Context(gill.language_model, len(prompts)), prompts, settings)
    places = []
    for story, answer in zip(stories, answers, strict=True):
        words, order = story.captions[0], 0
        since: list[str] = [words]
        for piece in answer.pieces:
            if isinstance(piece, TextPiece):
                words += piece.text
                since.append(piece.text)
            elif isinstance(piece, ImagePiece):
                places.append(Place(story.id, order, (" ".join(since),), words))
                order, since = order + 1, []
    if not places:
        return told
    places.sort(key=lambda place: place.order)
    examples = [_example(place, (place.told,)) for place in places]
    one = EvaluationSet("told_on", "Stories that the model continues", examples, len(places))
    paths = make(one, "gill", 0)
    rows = Rows(one.name, one.title, len(places), len(places), section.seed)
    numbers = [sum(place.story == story.id for place in places) for story in stories]
    told.results.append(
        replace(rows.mean("gill", "pictures", numbers), examples=len(stories), of=len(stories))
    )
    for metric, values in told_scores(places, paths).items():
        ceiling = 1.0 if metric == "stated_attributes" else None
        told.results.append(replace(rows.mean("gill", metric, values), ceiling=ceiling))
    told.records += _records(one, places, {"gill": paths})
    return told


def _records(
    one: EvaluationSet, places: Sequence[Place], made: dict[str, list[Path]]
) -> list[Record]:
    """One per picture; `prompt` is what was told since the picture before."""
    return [
        Record(
            set=one.name,
            id=example.id,
            prompt=story_prompt(place.words).strip(),
            context=example.described,
            real=place.real or None,
            scene=None if place.scene is None else " ".join(place.scene),
            pictures={method: str(paths[index]) for method, paths in made.items()},
        )
        for index, (example, place) in enumerate(zip(one.examples, places, strict=True))
    ]
