"""Words after a picture: captions and answers (Table 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from corpora.pictures import open_picture
from corpora.records import CaptionedImage, Question
from evaluation.metrics.basic import MetricUnavailable
from evaluation.metrics.meteor import Meteor
from evaluation.metrics.penn_treebank import treebank_words
from evaluation.metrics.text import caption_scores
from evaluation.metrics.vqa_accuracy import vqa_accuracies
from evaluation.pictures import content_of
from evaluation.progress import BATCH, Meter
from evaluation.results import Record, Result
from evaluation.scores import Found, Rows
from evaluation.sources import Source
from evaluation.store import EvaluationStore, key_for
from gill.loading import Gill
from miniature.world import VALUES, Scene
from pipeline.talking.captioning import CAPTION_TOKENS, words_after_pictures
from settings.evaluation import EvaluationParams

_MAX_ANSWER_TOKENS = 16
_BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")

_Say = Callable[[Sequence[Image.Image], Sequence[str]], list[str]]


@dataclass(frozen=True)
class _Asked:
    """One picture, what is said to GILL after it, and what people said."""

    id: str
    image: str
    prompt: str
    references: tuple[str, ...]


def captioning(
    gill: Gill, source: Source[CaptionedImage], section: EvaluationParams, store: EvaluationStore
) -> tuple[list[Result], list[Record]]:
    """COCO captioning: BLEU, METEOR, ROUGE-L and CIDEr against all captions of each picture.

    Table 7 and appendix E.1: COCO 2017 val, BLEU-4 and METEOR; the implementation is not named
    (here: as the COCO caption evaluation counts, see `evaluation.metrics`).
    `Gill.caption` makes them: greedy, after the picture and "A picture of", up to the first full
    stop, as in the released validation (gill/validate.py, UPSTREAM 34, 39); the miniature has no
    such prefix.
    Beside it on the miniature: how many of the five attributes a caption names, and the share of
    these that are right.
    """
    asked = [
        _Asked(one.id, one.image, gill.caption_prompt, one.captions)
        for one in source.examples[: section.coco.limit]
        if one.image is not None
    ]
    texts = _say(
        lambda pictures, _: gill.caption(pictures),
        asked,
        CAPTION_TOKENS,
        "captions of pictures",
        store,
    )
    found = score_captions(texts, [one.references for one in asked])
    scenes = [source.scenes.get(one.image) for one in asked]
    known = [(t, s) for t, s in zip(texts, scenes, strict=True) if s is not None]
    if len(known) == len(texts):
        named = [_compare(text, scene) for text, scene in known]
        found.values["attributes_named"] = [float(said) for said, _ in named]
        found.whole["attributes_right"] = sum(r for _, r in named) / max(
            1, sum(s for s, _ in named)
        )
    title = "Captions of COCO pictures"
    rows = Rows("coco_captioning", title, len(asked), source.of, section.seed)
    records = _records("coco_captioning", asked, texts)
    return rows.results("gill", found), records


def visual_questions(
    gill: Gill, source: Source[Question], section: EvaluationParams, store: EvaluationStore
) -> tuple[list[Result], list[Record]]:
    """VQAv2, zero-shot: accuracy of the greedy answer, with the official normalisation.

    Table 7 and appendix E.1: val split, no examples in the prompt. How the question is put the
    paper does not say, and the released code has no VQA evaluation: here the picture, then
    "Q: ...", then "A:" on its own line, the form that the released code gives to dialogues
    (`evaluation.sources.released_question_prompt`; on the miniature one line). A chat model is
    asked the bare question, in a turn. The answer is what follows, up to the end of its line and
    its first full stop.
    """
    put = source.prompt if gill.language_model.turns is None else str
    asked = [
        _Asked(one.id, one.image, put(one.question), one.answers)
        for one in source.examples[: section.vqa.limit]
        if one.image is not None
    ]

    def answer(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        pooled = gill.encoder.encode_pictures(pictures).float()
        return words_after_pictures(gill.model, pooled, prompts, _MAX_ANSWER_TOKENS)

    said = _say(answer, asked, _MAX_ANSWER_TOKENS, "questions about pictures", store)
    texts = [text.partition(".")[0].strip() for text in said]
    accuracies = vqa_accuracies(texts, [one.references for one in asked])
    title = "Questions about pictures"
    rows = Rows("vqa", title, len(asked), source.of, section.seed)
    scores = [{"gill.vqa_accuracy": value} for value in accuracies]
    records = _records("vqa", asked, texts, scores)
    return rows.results("gill", Found(values={"vqa_accuracy": accuracies})), records


def _say(
    say: _Say, asked: Sequence[_Asked], max_tokens: int, what: str, store: EvaluationStore
) -> list[str]:
    """What GILL says after each picture and its prompt; batches are fixed, as for pictures."""
    keys = [key_for(content_of(one.image), one.prompt, max_tokens, what) for one in asked]
    batches = [range(i, min(i + BATCH, len(asked))) for i in range(0, len(asked), BATCH)]
    todo = [batch for batch in batches if any(store.text(keys[i]) is None for i in batch)]
    with Meter(what, sum(map(len, todo)), "texts") as meter:
        for batch in todo:
            pictures = [open_picture(asked[i].image) for i in batch]
            texts = say(pictures, [asked[i].prompt for i in batch])
            store.save_texts({keys[i]: text for i, text in zip(batch, texts, strict=True)})
            meter.add(len(batch))
    return [text for key in keys if (text := store.text(key)) is not None]


def score_captions(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Found:
    """BLEU, ROUGE-L, CIDEr and METEOR of captions as written, or why there is none of it."""
    written = [" ".join(treebank_words(text)) for text in texts]
    real = [[" ".join(treebank_words(text)) for text in group] for group in references]
    found = Found()
    try:
        scores = caption_scores(written, real)
        found.values |= {"rouge_l": scores.rouge_l, "cider": scores.cider}
        found.whole |= dict(zip(_BLEU, scores.bleu, strict=True))
    except MetricUnavailable as error:
        found.absent |= dict.fromkeys((*_BLEU, "rouge_l", "cider"), str(error))
    try:
        found.whole["meteor"] = Meteor().score(written, real).corpus
    except MetricUnavailable as error:
        found.absent["meteor"] = str(error)
    return found


def _compare(text: str, scene: Scene) -> tuple[int, int]:
    """How many attributes a caption names, and how many of them are the scene's."""
    words = set(text.split())
    named = {name: words & set(values) for name, values in VALUES.items()}
    right = [said == {getattr(scene, name)} for name, said in named.items() if said]
    return len(right), sum(right)


def _records(
    set_: str,
    asked: Sequence[_Asked],
    texts: Sequence[str],
    scores: Sequence[dict[str, float]] | None = None,
) -> list[Record]:
    return [
        Record(
            set=set_,
            id=one.id,
            prompt=one.prompt,
            context=({"picture": one.image}, {"text": one.prompt}),
            real=one.image,
            references=one.references,
            texts={"gill": text},
            scores=scores[row] if scores else {},
        )
        for row, (one, text) in enumerate(zip(asked, texts, strict=True))
    ]
