"""What the words of the miniature's examples tell: no reading of them scores more, but by luck.

A story's last caption names two of five attributes at most: 1.0 is out of reach there.
"""

from __future__ import annotations

from evaluation.sets import EvaluationSet, Example, Picture
from miniature.language import stated
from miniature.world import VALUES


def oracle_ceiling(one: EvaluationSet, method: str) -> float | None:
    """The share of right attributes of who knows all that is told and guesses the rest evenly.

    The mean over the set's examples, of what `method` reads; None where the truth is not known.
    """
    if any(example.scene is None for example in one.examples):
        return None
    return sum(_known_or_guessed(e, method) for e in one.examples) / len(one.examples)


def _known_or_guessed(example: Example, method: str) -> float:
    # A picture shows every attribute, and what changes after it is told. The generator reads none.
    sees = method != "generator" and any(isinstance(part, Picture) for part in example.context)
    told = frozenset(VALUES) if sees else stated(example.prompt)
    shares = [1.0 if name in told else 1 / len(values) for name, values in VALUES.items()]
    return sum(shares) / len(shares)
