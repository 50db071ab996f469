"""The losses of Eq. 1 to 4, formed without ever holding a [tokens, vocabulary] tensor.

Legend: P supervised positions, n frozen output rows, r [IMG] rows, e width, B batch, p retrieval
width. The softmax is over the n frozen rows and, where `E_img` is given, the r [IMG] rows as well.
Logits are products in the dtype of the hidden states; everything after is at least float32.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Logits alive at any moment: 64 MiB in float32."""


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in float32, or in float64 where it already was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy_sum(
    hidden: Float[Tensor, "P e"],
    targets: Int64[Tensor, " P"],
    output_rows: Float[Tensor, "n e"],
    output_bias: Float[Tensor, " n"] | None = None,
    image_embeddings: Float[Tensor, "r e"] | None = None,
) -> Float[Tensor, ""]:
    """Sum over positions of the cross-entropy, with gradients to `hidden` and `image_embeddings`.

    The frozen rows get no gradient, so the [P, n] gradient of the logits never outlives its chunk:
    the gradients are formed in the forward pass, chunk by chunk.

    Args:
        targets: ids below n are frozen rows, n + i is [IMG i+1].
    """
    if image_embeddings is None:
        image_embeddings = hidden.new_zeros(0, hidden.shape[1])
    return _CrossEntropySum.apply(hidden, image_embeddings, targets, output_rows, output_bias)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        image_embeddings: Tensor,
        targets: Tensor,
        output_rows: Tensor,
        output_bias: Tensor | None,
    ) -> Tensor:
        needs_hidden, needs_images = ctx.needs_input_grad[:2]
        images = image_embeddings.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_images = torch.zeros_like(image_embeddings, dtype=wide)
        total = hidden.new_zeros((), dtype=wide)
        for part in _chunks(len(hidden), len(output_rows)):
            states, goal = hidden[part], targets[part]
            logits = _word_logits(states, output_rows, output_bias)
            image_logits = at_least_float32(states @ images.T)
            chosen = _chosen(logits, image_logits, goal)
            exponentials, word_sum, top = _exponentials(logits)
            normaliser = torch.logaddexp(top + word_sum.log(), _logsumexp(image_logits))
            total += (normaliser - chosen).sum()
            if needs_hidden or needs_images:
                probabilities = (image_logits - normaliser[:, None]).exp()
                probabilities -= _one_hot(goal - len(output_rows), len(images), wide)
            if needs_images:
                grad_images += probabilities.T.to(hidden.dtype) @ states
            if grad_hidden is not None:
                scale = (top - normaliser).exp()[:, None].to(hidden.dtype)
                grad = exponentials.to(hidden.dtype) @ output_rows
                is_word = (goal < len(output_rows))[:, None]
                rows = output_rows[goal.clamp(max=len(output_rows) - 1)]
                grad_hidden[part] = (
                    grad.mul_(scale) - rows * is_word + probabilities.to(hidden.dtype) @ images
                )
        ctx.save_for_backward(grad_hidden, grad_images.to(image_embeddings.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_images = ctx.saved_tensors
        (scale,) = grads
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            grad_images * scale.to(grad_images.dtype),
            None,
            None,
            None,
        )


def constant_cross_entropy_sum(
    hidden: Float[Tensor, "P e"],
    targets: Int64[Tensor, " P"],
    output_rows: Float[Tensor, "n e"],
    output_bias: Float[Tensor, " n"] | None,
    image_embeddings: Float[Tensor, "r e"],
) -> Float[Tensor, ""]:
    """`cross_entropy_sum` where `hidden` is constant: only `E_img` has a gradient.

    The frozen rows enter through one number per position, their logsumexp; the normaliser is
    logaddexp(that, logsumexp of the r image logits). Exact.
    """
    num_rows = len(output_rows)
    with torch.no_grad():
        normalisers, chosen = [], []
        for part in _chunks(len(hidden), num_rows):
            logits = _word_logits(hidden[part], output_rows, output_bias)
            word = targets[part].clamp(max=num_rows - 1)[:, None]
            chosen.append(logits.gather(1, word)[:, 0])
            _, total, top = _exponentials(logits)
            normalisers.append(top + total.log())
        words, chosen_word = torch.cat(normalisers), torch.cat(chosen)
    image_logits = at_least_float32(hidden @ image_embeddings.to(hidden.dtype).T)
    image = (targets - num_rows).clamp(min=0)[:, None]
    goal = torch.where(targets >= num_rows, image_logits.gather(1, image)[:, 0], chosen_word)
    return (torch.logaddexp(words, torch.logsumexp(image_logits, dim=1)) - goal).sum()


def _chunks(num_positions: int, num_rows: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // num_rows)
    return [slice(i, min(i + size, num_positions)) for i in range(0, num_positions, size)]


def _word_logits(states: Tensor, output_rows: Tensor, output_bias: Tensor | None) -> Tensor:
    return at_least_float32(F.linear(states, output_rows, output_bias))


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - max) in the place of `logits`, its sum over rows, and the max."""
    top = logits.amax(dim=1)
    exponentials = logits.sub_(top[:, None]).exp_()
    return exponentials, exponentials.sum(dim=1), top


def _logsumexp(logits: Tensor) -> Tensor:
    if logits.shape[1] == 0:
        return logits.new_full((len(logits),), float("-inf"))
    return torch.logsumexp(logits, dim=1)


def _chosen(logits: Tensor, image_logits: Tensor, targets: Tensor) -> Tensor:
    num_rows = logits.shape[1]
    word = logits.gather(1, targets.clamp(max=num_rows - 1)[:, None])[:, 0]
    if image_logits.shape[1] == 0:
        return word
    image = image_logits.gather(1, (targets - num_rows).clamp(min=0)[:, None])[:, 0]
    return torch.where(targets < num_rows, word, image)


def _one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Rows of the identity; a negative index gives zeros."""
    return (index[:, None] == torch.arange(size, device=index.device)).to(dtype)


def info_nce(
    queries: Float[Tensor, "B p"],
    keys: Float[Tensor, "B p"],
    logit_scale: Float[Tensor, ""],
    divide_gradient: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two terms of Eq. 4 over the global batch: text to image, and image to text.

    Under `torch.distributed` the batch is that of all ranks, each with B examples, and gradients
    flow through the gathering.

    Args:
        queries: normalised text vectors.
        keys: normalised image vectors.
        logit_scale: log(1 / tau).
        divide_gradient: what the released code does on W ranks: nothing flows back through the
            gathering, and data-parallel averaging then leaves 1/W of the gradient (UPSTREAM 12).
    """
    queries, keys = _gather(queries, divide_gradient), _gather(keys, divide_gradient)
    logits = logit_scale.exp() * queries @ keys.T
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own), F.cross_entropy(logits.T, own)


def _gather(x: Tensor, divide_gradient: bool) -> Tensor:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _Gather.apply(x, divide_gradient)


class _Gather(torch.autograd.Function):
    """Concatenation over ranks. Every rank forms the same loss, so the gradient of a rank's part is
    the sum of what all ranks send back; averaged over ranks it is the gradient of the one loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, divide_gradient: bool) -> Tensor:
        ctx.divide_gradient = divide_gradient
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        if not ctx.divide_gradient:
            dist.all_reduce(grad)
        size = len(grad) // dist.get_world_size()
        return grad[dist.get_rank() * size :][:size], None


def mean_squared_error(
    output: Float[Tensor, "*shape D"], target: Float[Tensor, "*shape D"]
) -> Float[Tensor, ""]:
    """Mean over every element: Eq. 3 as its text says it, up to the constant L * D."""
    return F.mse_loss(at_least_float32(output), target.to(at_least_float32(output).dtype))


def mean_distance(
    output: Float[Tensor, "*shape D"], target: Float[Tensor, "*shape D"]
) -> Float[Tensor, ""]:
    """Mean over examples and positions of the L2 distance, not squared (UPSTREAM 6)."""
    return torch.linalg.vector_norm(at_least_float32(output) - target, dim=-1).mean()
