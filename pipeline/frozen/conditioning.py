"""What the frozen image generator reads: the place where its text encoder and GILLMapper meet."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the generator reads for B prompts."""

    embedding: Float[Tensor, "B L D"]
    pooled: Float[Tensor, "B Dp"] | None = None
