"""What the frozen image generator reads: the place where its text encoder and GILLMapper meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the generator reads for B prompts."""

    embedding: Float[Tensor, "B L D"]
    pooled: Float[Tensor, "B Dp"] | None = None

    def __len__(self) -> int:
        return len(self.embedding)

    def part(self, span: slice) -> Conditioning:
        """That of some of the prompts."""
        return Conditioning(
            self.embedding[span], None if self.pooled is None else self.pooled[span]
        )

    @classmethod
    def join(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """That of all prompts of several."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        embedding = torch.cat([part.embedding for part in parts])
        return cls(embedding, torch.cat(pooled) if pooled else None)
