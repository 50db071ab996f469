"""The r [IMG] tokens: ids just past the frozen vocabulary, rows that live in `E_img` alone.

The frozen model is never resized. A frozen vocabulary of n rows (`LanguageModel.num_rows`) gives
the [IMG] tokens the ids n, n + 1, ..., n + r - 1:

    n = 601, r = 3:   [IMG1] = 601, [IMG2] = 602, [IMG3] = 603
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.frozen.language_model import LanguageModel


def image_token_ids(num_rows: int, r: int) -> list[int]:
    """Ids of [IMG1] ... [IMGr]. `image_token_ids(601, 3)` is `[601, 602, 603]`."""
    return list(range(num_rows, num_rows + r))


def embed_with_image_tokens(
    ids: Int64[Tensor, " T"],
    language_model: "LanguageModel",
    image_embeddings: Float[Tensor, "r e"],
) -> Float[Tensor, "T e"]:
    """Input embeddings of ids that may contain [IMG] tokens, in the language model's dtype."""
    num_rows = language_model.num_rows
    # Each id looks up both tables, at any row where it is not its own, and `where` takes the right
    # one: picking by a mask would make a shape of the data, and the device would be waited for.
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
def rescale_image_rows(
    image_embeddings: Float[Tensor, "r e"],
    mean_row_norm: float,
    unless: Bool[Tensor, ""] | None = None,
) -> None:
    """Scale each row of `E_img`, in place, to the mean norm of the frozen rows (UPSTREAM 31).

    The released code does this after every optimiser step; the paper does not mention it. Where
    `unless`, on the device, is true every row stays what it is.
    """
    norms = torch.linalg.vector_norm(image_embeddings, dim=-1, keepdim=True)
    factors = mean_row_norm / norms
    image_embeddings.mul_(factors if unless is None else factors.masked_fill(unless, 1.0))
