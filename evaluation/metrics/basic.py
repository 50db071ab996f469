"""Numbers over arrays: ranks and CLIP similarity.

Legend: B queries or pairs, N candidates, e width of an embedding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gill_errors import GillError, InputError


class MetricUnavailable(GillError, RuntimeError):  # noqa: N818
    """A metric whose published weights, tables or library are not on this machine.

    Says what is missing and how to get it. Reports show it as absent, never as another metric.
    """


def truth_ranks(similarities: Float[Tensor, "B N"], truth: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Rank of the true candidate of each query, 0 for the best; ties are counted against it.

    A candidate as similar as the truth is ranked before it, so that a model that gives every
    candidate the same score recalls nothing.

    Args:
        truth: index of the true candidate among the N.

    Raises:
        ValueError: NaN among the similarities, or a truth outside 0 to N - 1.
    """
    count = similarities.shape[1]
    outside = (truth < 0) | (truth >= count)
    if outside.any():
        query = int(outside.nonzero()[0, 0])
        raise InputError(
            f"query {query}: the true candidate is {int(truth[query])}, "
            f"and there are {count} candidates"
        )
    undefined = similarities.isnan().any(dim=1)
    if undefined.any():
        raise InputError(f"query {int(undefined.nonzero()[0, 0])}: NaN among its similarities")
    of_truth = similarities.gather(1, truth[:, None].long())
    # Less one for the truth, which is as similar as itself.
    return (similarities >= of_truth).sum(dim=1) - 1


def cosine_similarities(
    generated: Float[Tensor, "B e"], real: Float[Tensor, "B e"]
) -> Float[Tensor, " B"]:
    """Cosine between each generated picture's CLIP embedding and its real picture's.

    "CLIP Similarity" of section 4.1. Row i of both is example i; the vectors need not be of unit
    length. At least float32.

    Raises:
        ValueError: a vector of length zero, infinite or NaN.
    """
    wide = torch.promote_types(generated.dtype, torch.float32)
    return (_unit(generated.to(wide), "generated") * _unit(real.to(wide), "real")).sum(dim=1)


def _unit(vectors: Float[Tensor, "B e"], name: str) -> Float[Tensor, "B e"]:
    lengths = vectors.norm(dim=1, keepdim=True)
    bad = ~(lengths.isfinite() & (lengths > 0)).squeeze(1)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise InputError(f"{name} embedding {row} has length {float(lengths[row])}: no direction")
    return vectors / lengths
