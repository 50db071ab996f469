"""What is generated from: the examples of each table, with the protocol and where it is written.

Throughout: GILL reads the context and is made to say its [IMG] tokens after it (the released code
forces them with `gen_scale_factor=1e5`, UPSTREAM 35); the baseline is the same frozen generator
with its own text encoder, which reads the words of the context, cut on the right at its length
(section 4.1: "both models use the same image generation backbone"). Neighbouring texts are joined
by one space; beside pictures nothing is added (the released code joins token sequences). Guidance
and steps are those of params (`generation`); the paper states them for Table 8 alone, the released
code samples with 7.5 and 50. Example i of a set has the seed `evaluation.seed` + i for every method
and every context: differences between methods are paired. (Released: one generator, seed 42, for
all examples in turn; the paper averages 5 seeds.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from corpora.prompts import story_prompt
from corpora.records import CaptionedImage, Dialogue, Story
from evaluation.sources import CaptionSource, Source
from gill_errors import StageError
from miniature.world import Scene
from pipeline.talking.answers import ImageTokens
from settings.evaluation import EvaluationParams


@dataclass(frozen=True)
class Picture:
    """A picture of a context, not yet opened: a path or `shard.tar#member`."""

    reference: str


@dataclass(frozen=True)
class Example:
    """One test case. Pictures are references, so that any number of examples fits in memory."""

    id: str
    context: tuple[str | Picture | ImageTokens, ...]
    """Interleaved text and pictures, as GILL reads them."""
    prompt: str
    """The same in words alone, for the generator's own text encoder."""
    real: str
    """Reference of the real picture."""
    scene: Scene | None = None
    """The truth about it, where the miniature's oracle knows it."""

    @property
    def described(self) -> tuple[dict[str, str], ...]:
        """The context as records have it."""
        return tuple(
            {"text": part}
            if isinstance(part, str)
            else {"image_tokens": ""}
            if isinstance(part, ImageTokens)
            else {"picture": part.reference}
            for part in self.context
        )


@dataclass(frozen=True)
class EvaluationSet:
    """Examples of one protocol, taken from `of` that the files offer."""

    name: str
    title: str
    examples: Sequence[Example]
    of: int


def caption_set(source: CaptionSource, limit: int) -> EvaluationSet:
    """One caption, of each held-out picture of the run's own table: the CC3M column of Tables 3, 4.

    The first caption of each picture of the split `test`, in the order of the table; read alone.
    The paper generates from the CC3M validation set and reports FID (section 5, "GILLMapper
    Module"); how many captions it takes it does not say.

    Raises StageError when the table has no test rows.
    """
    table = source.table
    rows: list[int] = []
    seen: set[bytes] = set()
    split = table.rows_of_split("test")
    for row, picture in zip(split, table.pictures(split), strict=True):
        if picture not in seen:
            seen.add(picture)
            rows.append(int(row))
    if not rows:
        raise StageError(
            f"{table.path} has no row in the split `test`: name splits in the table, or set "
            "captions.test_fraction"
        )
    of, rows = len(rows), rows[:limit]
    images = table.images(rows)
    examples = [
        Example(f"row {row}", (caption,), caption, image, source.scenes(image))
        for row, caption, image in zip(rows, table.captions(rows), images, strict=True)
    ]
    return EvaluationSet("captions", "One caption", examples, of)


def table_1(source: Source[Story], limit: int | None) -> list[EvaluationSet]:
    """VIST: the last picture of a story from its last caption, its five captions, and the five
    captions with the four pictures before.

    Section 4.1, "Generating from Visual Stories"; evals/generate_vist_images.py of the released
    code, which takes the val split and leaves out stories that miss one of their pictures. The
    third context is "<text1><img1>...<text4><img4><text5>"; the generator reads the five captions
    there, since it takes no pictures (Table 1 prints none for it; Table 3 prints this one). The
    released code squeezes context pictures to 224 x 224 first; here they get the visual encoder's
    own resize and crop, as in training.
    """
    return [
        story_set(source, 1, pictures=False, limit=limit),
        story_set(source, 5, pictures=False, limit=limit),
        story_set(source, 5, pictures=True, limit=limit),
    ]


def figure_6(source: Source[Story], limit: int | None) -> list[EvaluationSet]:
    """VIST: the last n captions of a story, n from 1 to 5, without and with their n - 1 pictures.

    Section 5, "The Effect of Context", whose example is "2 captions and 1 image". That the context
    grows backwards from the last caption is our reading: the paper does not say which captions.
    """
    captions = [story_set(source, n, pictures=False, limit=limit) for n in range(1, 6)]
    return captions + [story_set(source, n, pictures=True, limit=limit) for n in range(2, 6)]


def story_set(
    source: Source[Story], captions: int, *, pictures: bool, limit: int | None
) -> EvaluationSet:
    """The last picture of each story from its last `captions` captions; see `table_1`."""
    examples = [
        replace(_story_example(story, captions, pictures), scene=source.scenes.get(story.id))
        for story in source.examples[:limit]
    ]
    plural = "caption" if captions == 1 else "captions"
    name, title = f"story_{captions}", f"Story, {captions} {plural}"
    if pictures:
        shown = "1 picture" if captions == 2 else f"{captions - 1} pictures"
        name, title = f"{name}_pictures", f"{title} and {shown}"
    return EvaluationSet(name, title, examples, source.of)


def _story_example(story: Story, captions: int, with_pictures: bool) -> Example:
    told = story.pictures[-captions:]
    words = story_prompt([one.caption for one in told])
    last = told[-1]
    assert last.image is not None, "stories are read with their pictures"
    if not with_pictures:
        return Example(story.id, (words,), words, last.image)
    parts: list[str | Picture] = []
    for one in told[:-1]:
        assert one.image is not None
        parts += [one.caption, Picture(one.image)]
    return Example(story.id, (*parts, last.caption), words, last.image)


def table_2(source: Source[Dialogue], limit: int | None) -> list[EvaluationSet]:
    """VisDial: the picture that a dialogue is about, from its first 1, 5 and 10 rounds.

    Section 4.1, "Generating from Visual Dialogue"; evals/generate_visdial_images.py of the released
    code: VisDial 1.0 val, "Q: ...?" and "A: ..." on a line each, without the caption, nothing after
    the last answer. The generator reads the same text. A dialogue of fewer rounds gives all it has.
    (The miniature's language model knows question and answer on one line: corpora.prompts.)
    """
    return [dialogue_set(source, rounds, limit) for rounds in (1, 5, 10)]


def figure_8(source: Source[Dialogue], limit: int | None) -> list[EvaluationSet]:
    """VisDial from the first n rounds, n from 1 to 10 (appendix E.2): otherwise as Table 2."""
    return [dialogue_set(source, rounds, limit) for rounds in range(1, 11)]


def dialogue_set(source: Source[Dialogue], rounds: int, limit: int | None) -> EvaluationSet:
    """The picture of each dialogue from its first `rounds` rounds; see `table_2`."""
    examples = []
    for dialogue in source.examples[:limit]:
        assert dialogue.image is not None, "dialogues are read with their pictures"
        prompt = source.prompt(dialogue.questions_and_answers[:rounds])
        scene = source.scenes.get(dialogue.id)
        examples.append(Example(dialogue.id, (prompt,), prompt, dialogue.image, scene))
    plural = "round" if rounds == 1 else "rounds"
    return EvaluationSet(f"dialogue_{rounds}", f"Dialogue, {rounds} {plural}", examples, source.of)


def table_8(source: Source[CaptionedImage], section: EvaluationParams) -> EvaluationSet:
    """COCO: pictures from random captions, whose FID is measured.

    Appendix E.3: "30,000 randomly sampled captions from the MS-COCO (2014) validation set",
    guidance 3.0, 250 DDIM steps (`settings.evaluation.PAPER_GENERATION`). Captions are drawn
    without replacement from those of all usable pictures, with `evaluation.seed`; each is compared
    with its own picture, so that both sides of FID have as many. Which captions the paper drew, and
    which real pictures it compared with, it does not say.
    """
    captions = [
        (f"{one.id}:{number}", caption, one.image)
        for one in source.examples
        for number, caption in enumerate(one.captions)
        if one.image is not None
    ]
    limit = section.coco_2014.limit
    count = len(captions) if limit is None else min(limit, len(captions))
    drawn = random.Random(section.seed).sample(captions, count)
    examples = [
        Example(id_, (caption,), caption, image, source.scenes.get(image))
        for id_, caption, image in drawn
    ]
    return EvaluationSet("coco_fid", "COCO, random captions", examples, len(captions))
