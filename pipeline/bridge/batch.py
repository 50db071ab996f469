"""The training batch: ragged captions as one token vector, and what was precomputed for them.

B examples, S caption tokens in all, d visual width, L x D the target of the image generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gill_errors import InputError
from pipeline.devices import sent


@dataclass(frozen=True)
class CaptionBatch:
    """B captions with their pictures' features and their targets.

    `offsets` stays on the CPU: the shapes of a step are decided there, with no wait for a device.
    """

    tokens: Int64[Tensor, " S"]
    """Caption ids one after the other: no start ids, no padding, no [IMG] tokens."""
    offsets: Int64[Tensor, " bounds"]
    """Caption i is `tokens[offsets[i] : offsets[i + 1]]`; B + 1 numbers, on the CPU."""
    pooled: Float[Tensor, "B d"]
    """v_phi(x): the visual encoder's pooled vector before any projection."""
    targets: Float[Tensor, "B L D"]
    """T_psi(y): the output of the image generator's text encoder at every position."""
    rows: Int64[Tensor, " B"]
    """Rows of the caption table these examples come from."""
    pooled_targets: Float[Tensor, "B D_pooled"] | None = None
    """The pooled text vector, for generators that also need one."""
    posterior: Float[Tensor, "B moments C H W"] | None = None
    """Mean and deviation of the pictures' latents by the frozen autoencoder, for `denoising`."""

    def __post_init__(self) -> None:
        lengths = self.offsets.diff()
        if len(lengths) != len(self.pooled) or int(self.offsets[0]) != 0:
            raise InputError(
                f"offsets describe {len(lengths)} captions from token {int(self.offsets[0])}, "
                f"but there are {len(self.pooled)} pooled vectors"
            )
        if int(self.offsets[-1]) != len(self.tokens):
            raise InputError(
                f"offsets end at {int(self.offsets[-1])}, but there are {len(self.tokens)} tokens"
            )
        if int(lengths.min()) < 1:
            empty = int(lengths.argmin())
            raise InputError(
                f"example {empty} (row {int(self.rows[empty])}): the caption has no tokens"
            )

    @classmethod
    def from_lists(
        cls,
        captions: Sequence[Sequence[int]],
        pooled: Float[Tensor, "B d"],
        targets: Float[Tensor, "B L D"],
        rows: Int64[Tensor, " B"],
        max_tokens: int,
        pooled_targets: Float[Tensor, "B D_pooled"] | None = None,
        posterior: Float[Tensor, "B moments C H W"] | None = None,
    ) -> "CaptionBatch":
        """Pack `captions` (ids without start ids), each cut after `max_tokens` tokens.

        The released code allows 32 positions for start id, caption and r [IMG] tokens, that is
        `max_tokens = 23` at r = 8 (UPSTREAM 24).

        Raises:
            ValueError: a caption is empty, or the counts do not agree.
        """
        if max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
        cut = [list(caption[:max_tokens]) for caption in captions]
        offsets = torch.tensor([0, *map(len, cut)], dtype=torch.int64).cumsum(0)
        tokens = torch.tensor([i for caption in cut for i in caption], dtype=torch.int64)
        return cls(tokens, offsets, pooled, targets, rows, pooled_targets, posterior)

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def lengths(self) -> list[int]:
        """Tokens per caption."""
        return self.offsets.diff().tolist()

    @property
    def num_tokens(self) -> int:
        """Tokens of all captions."""
        return len(self.tokens)

    def to(self, device: torch.device | str) -> "CaptionBatch":
        """The same batch with every tensor but `offsets` on `device`."""
        moved = {
            field.name: sent(getattr(self, field.name), torch.device(device))
            for field in fields(self)
            if field.name != "offsets" and getattr(self, field.name) is not None
        }
        return replace(self, **moved)


def take_examples(batch: CaptionBatch, start: int, stop: int) -> CaptionBatch:
    """Examples `start` to `stop` of a batch, for instance one process's part of a global one."""
    begin, end = int(batch.offsets[start]), int(batch.offsets[stop])
    cut = {
        field.name: getattr(batch, field.name)[start:stop]
        for field in fields(batch)
        if field.name not in ("tokens", "offsets") and getattr(batch, field.name) is not None
    }
    return replace(
        batch,
        tokens=batch.tokens[begin:end],
        offsets=batch.offsets[start : stop + 1] - begin,
        **cut,
    )
