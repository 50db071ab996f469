"""The next token, drawn from logits.

Letters: B rows, C candidates for the next token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pipeline.devices import sent


def draw_tokens(
    logits: Float[Tensor, "B C"],
    temperature: float,
    top_k: int | None,
    top_p: float,
    generators: Sequence[torch.Generator | None],
) -> list[int]:
    """One token per row, drawn with the row's own generator from `filtered_probabilities`."""
    odds = filtered_probabilities(logits, temperature, top_k, top_p)
    cumulative = odds.cumsum(dim=-1)
    total = cumulative[:, -1:]
    draws = torch.stack(
        [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
    )
    # Below the total whatever the rounding: then the token found has some probability.
    threshold = torch.minimum(
        sent(draws, total.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].tolist()


def filtered_probabilities(
    logits: Float[Tensor, "B C"], temperature: float, top_k: int | None, top_p: float
) -> Float64[Tensor, "B C"]:
    """Softmax over the `top_k` likeliest tokens, of these over the fewest that hold `top_p`.

    For every temperature above 0: towards 0 only the likeliest token is left. It always is, however
    small `top_p`.
    """
    if top_k is not None and top_k < logits.shape[1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    # Differences to the largest, which stays 0 whatever it is divided by. Smaller numbers than the
    # smallest normal one are 0 to a processor that flushes them.
    apart = logits.double() - logits.double().amax(dim=-1, keepdim=True)
    odds = (apart / max(temperature, torch.finfo(torch.float64).tiny)).softmax(dim=-1)
    if top_p < 1:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        ranked = odds.gather(1, order)
        beyond = ranked.cumsum(dim=-1) - ranked >= top_p
        beyond[:, 0] = False
        odds = odds.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0.0)
    return odds


def penalise_repetition(logits: Float[Tensor, " C"], said: Sequence[int], penalty: float) -> None:
    """In place: the logit of every token in `said` moves towards less likely (CTRL)."""
    if penalty == 1.0:
        return
    seen = torch.tensor(sorted(set(said)), dtype=torch.long, device=logits.device)
    old = logits[seen]
    logits[seen] = torch.where(old < 0, old * penalty, old / penalty)


def penalise_presence(
    logits: Float[Tensor, " C"], said: Sequence[int], presence: float, frequency: float
) -> None:
    """In place: `presence` off the logit of every token in `said`, `frequency` off it for every
    time that it stands there (OpenAI's)."""
    if presence == frequency == 0 or not said:
        return
    ids = torch.tensor(said, dtype=torch.long, device=logits.device)
    tokens, counts = ids.unique(return_counts=True)
    logits[tokens] -= presence + frequency * counts
