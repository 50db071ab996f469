"""How the miniature's oracle votes between a generated and a retrieved picture of one prompt."""

from __future__ import annotations


def vote(generated_right: int, retrieved_right: int, attributes: int) -> str:
    """The vote: "gen" or "ret", whichever has more of the prompt's `attributes` right.

    Alike and complete: "ret", the real picture. Alike and not complete: "same", which is no class.
    """
    if generated_right == retrieved_right:
        return "ret" if retrieved_right == attributes else "same"
    return "gen" if generated_right > retrieved_right else "ret"
