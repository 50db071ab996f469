"""How a story or a dialogue becomes the text that is given to a model. Pure string functions.

The paper (section 4.1) says which captions and rounds are given, not how they are joined.
"""

from collections.abc import Sequence


def story_prompt(captions: Sequence[str]) -> str:
    """The captions of a story, in order, as one text.

    story_prompt(["we went out .", "it rained ."])  ->  "we went out . it rained ."
    """
    return " ".join(captions)


def dialogue_prompt(rounds: Sequence[tuple[str, str]]) -> str:
    """Rounds of question and answer, one per line.

    dialogue_prompt([("is it red?", "no"), ("is it big?", "yes")])
      ->  "Q: is it red? A: no\\nQ: is it big? A: yes"
    """
    return "\n".join(f"Q: {question} A: {answer}" for question, answer in rounds)


def released_dialogue_prompt(rounds: Sequence[tuple[str, str]]) -> str:
    """The form that produced the published VisDial numbers (released code,
    evals/generate_visdial_images.py): VisDial's questions get back their question mark, and
    question and answer have a line each.

    released_dialogue_prompt([("is it red", "no")])  ->  "Q: is it red?\\nA: no"
    """
    return "\n".join(f"Q: {question}?\nA: {answer}" for question, answer in rounds)
