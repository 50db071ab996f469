"""Whether a chat model knows when a picture is asked for, and keeps its words.

No table of the paper. Half of `evaluation.chat_turns` are requests (phrasings that training never
saw, around captions of test pictures), half are questions that it never saw. All answers are
greedy, as the service gives them, and compared in their first tokens (`evaluation.chat_answers`).

    right_choice    share of the turns in whose answer a picture comes where one was asked for, and
                    none where not
    words_kept      share of the questions whose answer is the frozen language model's own, token
                    for token, with pictures allowed and with pictures switched off; and, after an
                    exchange about a picture, share of the answers in words that are the same where
                    its caption stands in the picture's place
    first_word_kl   nats from the distribution over an answer's first word after that caption to the
                    one after the picture
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from corpora.chat_requests import Question, asked_for, own_questions, phrasings, read_part
from evaluation.chat_answers import ChatAnswer, ChatAnswers, Line, Talk, question
from evaluation.results import Record, Result
from evaluation.scores import Rows
from evaluation.sets import EvaluationSet, Example, Picture
from settings.evaluation import EvaluationParams
from settings.replies import OWN_QUESTIONS, RepliesParams


@dataclass(frozen=True)
class HeldOut:
    """What is said to the model."""

    requests: Sequence[Example]
    questions: Sequence[tuple[str, Talk]]
    """(id, what ends with the question)."""
    of: int
    """Questions there are."""


def asked_set(captions: EvaluationSet) -> EvaluationSet:
    """Captions asked for in phrasings that training never saw; the generator reads them bare."""
    ways = phrasings("held_out").asked
    examples = [
        replace(example, context=(asked_for(ways[number % len(ways)], example.prompt),))
        for number, example in enumerate(captions.examples)
    ]
    return EvaluationSet("asked", "Asked for in unseen phrasings", examples, captions.of)


def held_out_questions(replies: RepliesParams) -> list[Question]:
    """Those of the user's file that training never sees, where it takes one and has any of them;
    otherwise this project's own.

    Raises CorpusError as `corpora.chat_requests.read_questions`.
    """
    if replies.questions != OWN_QUESTIONS:
        if held_out := read_part(replies.questions, "held_out", replies.held_out):
            return held_out
        print(
            f"chat: no question of {replies.questions} is held out (training.replies.held_out: "
            f"{replies.held_out}); asked are the built-in ones"
        )
    return own_questions("held_out")


def held_out_turns(
    asked: EvaluationSet, held_out: Sequence[Question], section: EvaluationParams
) -> HeldOut:
    """Requests as long as there are any, and as many questions, drawn with `evaluation.seed`."""
    count = min(section.chat_turns // 2, len(held_out))
    drawn = sorted(random.Random(section.seed).sample(range(len(held_out)), count))
    questions = [
        (f"question {n}", tuple(Line(said.role, (said.text,)) for said in held_out[n]))
        for n in drawn
    ]
    requests = asked.examples[: section.chat_turns - section.chat_turns // 2]
    return HeldOut(requests, questions, len(held_out))


def measure_turns(
    answers: ChatAnswers, turns: HeldOut, section: EvaluationParams
) -> tuple[list[Result], list[Record]]:
    """All of which the module speaks, with a record per turn."""
    requests = [question(_only_text(example)) for example in turns.requests]
    questions = [talk for _, talk in turns.questions]
    asked, free = answers.served(requests), answers.served(questions)
    drawn = [float(one.draws) for one in asked]
    left = [float(not one.draws) for one in free]
    own, in_words = answers.own(questions), answers.in_words(questions)
    kept, kept_in_words = _alike(own, free), _alike(own, in_words)
    about = _after_picture(turns, with_picture=True)
    told = _after_picture(turns, with_picture=False)
    after, before = answers.in_words(about), answers.in_words(told)
    same = _alike(before, after)
    nats = _divergence(answers, told, about)

    def mean(name: str, title: str, metric: str, values: Sequence[float], of: int) -> Result:
        rows = Rows(name, title, len(values), of, section.seed)
        return rows.mean("gill", metric, values)

    of, count = turns.of, len(turns.requests)
    behind = ("after_picture", "Answers in words after an exchange about a picture")
    results = [
        mean("turns", "All turns", "right_choice", [*drawn, *left], count + of),
        mean("requests", "Requests in unseen phrasings", "right_choice", drawn, count),
        mean("questions", "Unseen questions", "right_choice", left, of),
        mean("own_words", "Answers to unseen questions", "words_kept", kept, of),
        mean("own_words_alone", "The same, pictures switched off", "words_kept", kept_in_words, of),
        mean(*behind, "words_kept", same, of),
        mean(*behind, "first_word_kl", nats, of),
    ]
    records = [
        Record(
            set="requests",
            id=example.id,
            prompt=_only_text(example),
            context=example.described,
            real=example.real,
            scene=None if example.scene is None else " ".join(example.scene),
            texts={"gill": one.text},
            scores={"gill.right_choice": value},
        )
        for example, one, value in zip(turns.requests, asked, drawn, strict=True)
    ]
    for number, (id_, talk) in enumerate(turns.questions):
        records.append(
            Record(
                set="questions",
                id=id_,
                prompt=_last_words(talk),
                context=_described(talk),
                texts={"gill": free[number].text, "language_model": own[number].text},
                scores={
                    "gill.right_choice": left[number],
                    "gill.words_kept": kept[number],
                    "gill.words_kept_alone": kept_in_words[number],
                },
            )
        )
    for number, (talk, (id_, _)) in enumerate(zip(about, turns.questions, strict=True)):
        records.append(
            Record(
                set="after_picture",
                id=id_,
                prompt=_last_words(talk),
                context=_described(talk),
                texts={"gill": after[number].text, "language_model": before[number].text},
                scores={"gill.words_kept": same[number], "gill.first_word_kl": nats[number]},
            )
        )
    return results, records


def _after_picture(turns: HeldOut, *, with_picture: bool) -> list[Talk]:
    """Each question after an exchange about a test picture, or about its caption in its place."""
    ways = phrasings("held_out").shown
    talks = []
    for number, (_, asked) in enumerate(turns.questions):
        example, way = turns.requests[number % len(turns.requests)], ways[number % len(ways)]
        shown: tuple[str | Picture, ...] = (f"{example.prompt} {way}",)
        if with_picture:
            shown = (Picture(example.real), way)
        answered = Line("assistant", (example.prompt,))
        talks.append((*asked[:-1], Line("user", shown), answered, asked[-1]))
    return talks


def _divergence(answers: ChatAnswers, told: Sequence[Talk], about: Sequence[Talk]) -> list[float]:
    before, after = answers.next_words(told), answers.next_words(about)
    nats = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True)
    return nats.sum(-1).tolist()


def _alike(some: Sequence[ChatAnswer], others: Sequence[ChatAnswer]) -> list[float]:
    return [float(one.says_as(other)) for one, other in zip(some, others, strict=True)]


def _last_words(talk: Talk) -> str:
    [text] = talk[-1].parts
    assert isinstance(text, str)
    return text


def _described(talk: Talk) -> tuple[dict[str, str], ...]:
    return tuple(
        {"text": part} if isinstance(part, str) else {"picture": part.reference}
        for line in talk
        for part in line.parts
    )


def _only_text(example: Example) -> str:
    [text] = example.context
    assert isinstance(text, str)
    return text
