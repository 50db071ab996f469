"""VQA accuracy: an answer in words against the answers of ten people.

Antol et al. 2015, "VQA: Visual Question Answering", section 4, as the evaluation code of VQA v2
computes it (visualqa.org/evaluation). Table 7 of the paper reports it "after applying the
normalization described in the VQA repo".
"""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import yaml

from gill_errors import InputError

_WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_NUMBERS: dict[str, str] = _WORDS["numbers"]
_ARTICLES = frozenset(_WORDS["articles"])
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _WORDS["with_apostrophe"].split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # The other way round, in the official table too.

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def normalise_answer(answer: str) -> str:
    """The form in which answers are compared.

    In this order: punctuation but for apostrophe, colon and decimal point becomes a space, or
    nothing where it has a space beside it anywhere in the answer or the answer has a number with a
    comma; capitals go; number words up to ten become digits, and "none" too; articles go; a
    contraction without its apostrophe gets it.

    "The red,white flag" -> "red white flag"    "1,000" -> "1000"
    "Two dogs." -> "2 dogs"                     "dont know" -> "don't know"
    """
    answer = _one_line(answer)
    stripped = answer
    numeric = _DIGITS_WITH_COMMA.search(answer) is not None
    for mark in _MARKS:
        spaced = f"{mark} " in answer or f" {mark}" in answer
        stripped = stripped.replace(mark, "" if spaced or numeric else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", stripped).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Accuracy of one answer: min(1, people who gave it / 3), averaged over whom to leave out.

    With ten people, an answer that 0, 1, 2, 3 or more of them gave has 0, 0.3, 0.6, 0.9 or 1.

    As in the official code, where all people wrote the same, nothing is normalised: the answer has
    to be what they wrote, to the letter.

    Args:
        answer: the model's answer as text.
        people: the answers collected for the question, ten in VQA.

    Raises:
        ValueError: fewer than two people, so that none can be left out.
    """
    if len(people) < 2:
        raise InputError(
            f"VQA accuracy leaves out one person of several, and there is {len(people)}"
        )
    people = [_one_line(person) for person in people]
    answer = _one_line(answer)
    if len(set(people)) > 1:
        people = [normalise_answer(person) for person in people]
        answer = normalise_answer(answer)
    agrees = [person == answer for person in people]
    return fmean(min(1.0, (sum(agrees) - left_out) / 3) for left_out in agrees)


def vqa_accuracies(answers: Sequence[str], people: Sequence[Sequence[str]]) -> list[float]:
    """`vqa_accuracy` of each question; the mean is the accuracy of the model.

    Raises:
        ValueError: lists of different length, and as `vqa_accuracy`, naming the question.
    """
    if len(answers) != len(people):
        raise InputError(f"{len(answers)} answers to {len(people)} questions")
    accuracies = []
    for row, (answer, group) in enumerate(zip(answers, people, strict=True)):
        try:
            accuracies.append(vqa_accuracy(answer, group))
        except ValueError as error:
            raise InputError(f"question {row}: {error}") from None
    return accuracies


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
