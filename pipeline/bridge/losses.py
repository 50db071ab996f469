"""The losses of Eq. 1 to 4, formed without ever holding a [tokens, vocabulary] tensor.

The cross-entropy sweeps over the vocabulary block by block with a running maximum, as attention
kernels do over keys, so that a block of logits stays in the cache and none is kept.

Legend: P supervised positions, n frozen output rows, r [IMG] rows, e width, B batch, p retrieval
width. The softmax is over the n frozen rows and, where `E_img` is given, the r [IMG] rows as well.
Logits are products in the dtype of the hidden states; everything after is at least float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
"""Logits of one block, by device: what stays in a core's cache; what keeps a GPU busy."""


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

    The frozen rows get no gradient, so the [P, n] gradient of the logits is never needed as such:
    both gradients are formed in the forward pass.

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
        # The softmax over n + r rows from two parts: the words, swept in blocks, and [P, r] image
        # logits. With r = 0 their logsumexp is -inf and the words stand alone.
        words = _sweep(hidden, targets, output_rows, output_bias, ctx.needs_input_grad[0])
        images = image_embeddings.to(hidden.dtype)
        image_logits = at_least_float32(hidden @ images.T)
        normaliser = torch.logaddexp(words.logsumexp, image_logits.logsumexp(1))
        chosen = _choose(words.chosen, image_logits, targets - len(output_rows))

        # d(sum)/d(image logits): the softmax of the [IMG] rows less the one-hot target.
        grad_logits = (image_logits - normaliser[:, None]).exp()
        grad_logits -= _one_hot(targets - len(output_rows), grad_logits)
        grad_logits = grad_logits.to(hidden.dtype)
        # [r, P] @ [P, e]. The rows' own dtype, as autograd expects of a gradient.
        grad_images = (grad_logits.T @ hidden).to(image_embeddings.dtype)
        grad_hidden = None
        if words.expected is not None:
            # d(sum)/d(hidden) is the mean row under the softmax less the target's row. `expected`
            # is the mean under the words' softmax, so it counts by their share of all n + r.
            is_word = (targets < len(output_rows))[:, None]
            target_rows = output_rows[targets.clamp(max=len(output_rows) - 1)] * is_word
            # An [IMG] target's row is not taken off here: `grad_logits` holds its -1 already.
            share = (words.logsumexp - normaliser).exp()[:, None]
            grad_hidden = words.expected * share - target_rows + grad_logits @ images
            grad_hidden = grad_hidden.to(hidden.dtype)
        # Finished gradients are kept, [P, e] and [r, e], and nothing to form them again.
        ctx.save_for_backward(grad_hidden, grad_images)
        return (normaliser - chosen).sum()

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
    with torch.no_grad():
        words = _sweep(hidden, targets, output_rows, output_bias, want_expected=False)
    image_logits = at_least_float32(hidden @ image_embeddings.to(hidden.dtype).T)
    chosen = _choose(words.chosen, image_logits, targets - len(output_rows))
    return (torch.logaddexp(words.logsumexp, image_logits.logsumexp(1)) - chosen).sum()


@dataclass(frozen=True)
class _Words:
    """What the cross-entropy needs to know of the frozen rows."""

    logsumexp: Tensor  # [P]
    chosen: Tensor  # [P] logit of the target; meaningless where the target is no word
    expected: Tensor | None  # [P, e] mean output row under the softmax over words


def _sweep(
    hidden: Tensor,
    targets: Tensor,
    output_rows: Tensor,
    output_bias: Tensor | None,
    want_expected: bool,
) -> _Words:
    # Running sums over blocks of rows, relative to the largest logit so far, `top` [P]: what is
    # summed under an older `top` shrinks by exp(old - new). At first exp(-inf) = 0.
    num_rows, wide = len(output_rows), torch.promote_types(hidden.dtype, torch.float32)
    top = hidden.new_full((len(hidden),), float("-inf"), dtype=wide)
    total, chosen = torch.zeros_like(top), torch.zeros_like(top)
    weighted = torch.zeros_like(hidden, dtype=wide) if want_expected else None
    elements = BLOCK_ELEMENTS.get(hidden.device.type, BLOCK_ELEMENTS["cpu"])
    # Rows per block, so that [P, size] logits have about `elements` numbers whatever P is.
    size = max(1, elements // len(hidden))
    for begin in range(0, num_rows, size):
        rows = output_rows[begin : begin + size]
        bias = None if output_bias is None else output_bias[begin : begin + size]
        logits = at_least_float32(F.linear(hidden, rows, bias))
        place = targets - begin
        # A target outside this block reads some other logit, which the next line drops.
        logit = logits.gather(1, place.clamp(0, len(rows) - 1)[:, None])[:, 0]
        chosen = torch.where((place >= 0) & (place < len(rows)), logit, chosen)
        new_top = torch.maximum(top, logits.amax(dim=1))
        shrink = (top - new_top).exp()
        # In place, hence last: nothing reads the logits after this.
        exponentials = logits.sub_(new_top[:, None]).exp_()
        total = total * shrink + exponentials.sum(dim=1)
        if weighted is not None:
            # [P, size] @ [size, e]: the product in the rows' dtype, the sum over blocks in `wide`.
            weighted.mul_(shrink[:, None]).add_(exponentials.to(hidden.dtype) @ rows)
        top = new_top
    expected = None if weighted is None else weighted.div_(total[:, None])
    return _Words(top + total.log(), chosen, expected)


def _choose(words: Tensor, image_logits: Tensor, image: Tensor) -> Tensor:
    """The target's logit, where `image` is negative a word's."""
    if image_logits.shape[1] == 0:
        return words
    return torch.where(image < 0, words, image_logits.gather(1, image.clamp(min=0)[:, None])[:, 0])


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    """Rows of the identity in the shape and dtype of `like`; a negative index gives zeros."""
    return (index[:, None] == torch.arange(like.shape[1], device=index.device)).to(like.dtype)


def info_nce(
    queries: Float[Tensor, "B p"],
    keys: Float[Tensor, "B p"],
    logit_scale: Float[Tensor, ""],
    divide_gradient: bool = False,
    pictures: Int64[Tensor, " B"] | None = None,
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
        pictures: which picture each example is about. Examples about the same one are not compared
            with each other, and ranks may hold different numbers of them, or none. None: all
            differ, and all ranks hold as many.
    """
    sizes = None if pictures is None else _sizes(pictures)
    # [W * B, p] each: every rank forms the same [W * B, W * B] logits, texts down, pictures across.
    queries = _gather(queries, divide_gradient, sizes)
    keys = _gather(keys, divide_gradient, sizes)
    logits = logit_scale.exp() * queries @ keys.T
    if pictures is not None:
        pictures = _gather(pictures, divide_gradient, sizes)
        if len(pictures) == 0:
            # Zero, not the mean of nothing; with the gradients that other ranks wait for.
            return logits.sum(), logits.sum()
        others = ~torch.eye(len(pictures), dtype=torch.bool, device=pictures.device)
        same = (pictures[:, None] == pictures) & others
        logits = logits.masked_fill(same, float("-inf"))
    # The diagonal: query i belongs to key i, as ranks are gathered in one order for both.
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own), F.cross_entropy(logits.T, own)


def _sizes(x: Tensor) -> list[int] | None:
    """Rows of `x` in each rank; None where there is one."""
    if not _several_ranks():
        return None
    sizes = [
        torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    return [int(size) for size in sizes]


def _gather(x: Tensor, divide_gradient: bool, sizes: list[int] | None = None) -> Tensor:
    """Concatenation over ranks, whose rows are `sizes`, by default equally many."""
    if not _several_ranks():
        return x
    return _Gather.apply(x, divide_gradient, sizes or [len(x)] * dist.get_world_size())


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """Concatenation over ranks. Every rank forms the same loss, so the gradient of a rank's part is
    the sum of what all ranks send back; averaged over ranks it is the gradient of the one loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, divide_gradient: bool, sizes: list[int]) -> Tensor:
        ctx.divide_gradient, ctx.sizes = divide_gradient, sizes
        # As long as the longest: what is sent has one size.
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        # Without the sum a rank's part gets only what its own copy of the loss sends back.
        if not ctx.divide_gradient:
            dist.all_reduce(grad)
        return grad.split(ctx.sizes)[dist.get_rank()], None, None


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
