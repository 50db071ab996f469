"""How a story or a dialogue becomes the text that is given to a model. Pure string functions."""

from collections.abc import Sequence


def story_prompt(captions: Sequence[str]) -> str:
    """The captions of a story, in order, as one text (paper, section 4.1: 5 captions as one input).

    story_prompt(["we went out .", "it rained ."])  ->  "we went out . it rained ."
    """
    return " ".join(captions)


def dialogue_prompt(rounds: Sequence[tuple[str, str]]) -> str:
    """Rounds of question and answer, one per line (paper, section 4.1 and Figure 8).

    dialogue_prompt([("is it red?", "no"), ("is it big?", "yes")])
      ->  "Q: is it red? A: no\\nQ: is it big? A: yes"
    """
    return "\n".join(f"Q: {question} A: {answer}" for question, answer in rounds)
