"""The r [IMG] tokens: ids just past the frozen vocabulary, rows that live in `E_img` alone.

The frozen model is never resized. A frozen vocabulary of n rows (`LanguageModel.num_rows`) gives
the [IMG] tokens the ids n, n + 1, ..., n + r - 1:

    n = 601, r = 3:   [IMG1] = 601, [IMG2] = 602, [IMG3] = 603
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.frozen.language_model import LanguageModel


def image_token_ids(num_rows: int, r: int) -> list[int]:
    """Ids of [IMG1] ... [IMGr]. `image_token_ids(601, 3)` is `[601, 602, 603]`."""
    return list(range(num_rows, num_rows + r))


def find_image_tokens(ids: Sequence[int], num_rows: int, r: int) -> list[int]:
    """Where each complete run [IMG1] ... [IMGr] begins.

    `find_image_tokens([5, 601, 602, 7, 601], num_rows=601, r=2)` is `[1]`: the last is cut short.
    """
    run = image_token_ids(num_rows, r)
    ids = list(ids)
    return [i for i in range(len(ids) - r + 1) if ids[i : i + r] == run]


def force_image_tokens(
    logits: Float[Tensor, "B V"], previous: Int64[Tensor, " B"], num_rows: int, r: int
) -> Float[Tensor, "B V"]:
    """Logits under which [IMG2..r] follow [IMG1] and never come otherwise (section 3.2).

    Args:
        logits: next-token logits over the frozen rows and then the r [IMG] rows.
        previous: the id chosen before, one per sequence.

    Returns:
        New logits. After [IMGi], i < r, every id but [IMGi+1] is -inf; elsewhere [IMG2..r] are
        -inf. [IMG1] is left to compete with the words.
    """
    ids = torch.arange(logits.shape[1], device=logits.device)
    inside = (previous >= num_rows) & (previous < num_rows + r - 1)
    successor = ids[None, :] == previous[:, None] + 1
    later = (ids > num_rows) & (ids < num_rows + r)
    banned = torch.where(inside[:, None], ~successor, later[None, :])
    return logits.masked_fill(banned, float("-inf"))


def embed_with_image_tokens(
    ids: Int64[Tensor, " T"],
    language_model: "LanguageModel",
    image_embeddings: Float[Tensor, "r e"],
) -> Float[Tensor, "T e"]:
    """Input embeddings of ids that may contain [IMG] tokens, in the language model's dtype."""
    num_rows = language_model.num_rows
    is_image = ids >= num_rows
    words = language_model.embed(ids.masked_fill(is_image, 0))
    images = image_embeddings.to(words.dtype)[(ids - num_rows).clamp(min=0)]
    return torch.where(is_image[:, None], images, words)


def append_image_logits(
    word_logits: Float[Tensor, "*batch n"],
    hidden: Float[Tensor, "*batch e"],
    image_embeddings: Float[Tensor, "r e"],
) -> Float[Tensor, "*batch V"]:
    """Logits over the n frozen rows followed by the r [IMG] rows (V = n + r); `E_img` is tied."""
    return torch.cat([word_logits, hidden @ image_embeddings.to(hidden.dtype).T], dim=-1)


@torch.no_grad()
def rescale_image_rows(image_embeddings: Float[Tensor, "r e"], mean_row_norm: float) -> None:
    """Scale each row of `E_img`, in place, to the mean norm of the frozen rows (UPSTREAM 31).

    The released code does this after every optimiser step; the paper does not mention it.
    """
    norms = torch.linalg.vector_norm(image_embeddings, dim=-1, keepdim=True)
    image_embeddings.mul_(mean_row_norm / norms)
