"""How every tiny backbone is optimised: Muon for matrices, Adam for the rest, one schedule."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

Report = Callable[[str], None]


class Recipe(BaseModel):
    """What sizes and training of a part are made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates of matrices (Jordan et al., 2024).

    Tensors of more than two dimensions (convolutions) are matrices [first, rest]. The update is
    scaled by `sqrt(max(1, rows / columns))`.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                # Nesterov: the step looks ahead, from the gradient on towards the momentum.
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(momentum, group["momentum"]).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor, iterations: int = 4) -> Tensor:
    """Pushes all singular values of a matrix towards 1: quintic Newton-Schulz iteration."""
    # The product below is of the smaller side.
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        # x -> a x + b x^3 + c x^5 on every singular value: steep at 0, and flat enough around 1.
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Optimization:
    """Updates parameters over a fixed number of steps: warm-up, plateau, linear decay."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        num_steps: int,
        matrix_rate: float,
        other_rate: float,
        share_of_rate: Callable[[str], float] = lambda name: 1.0,
        decay_share: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        """Gives matrices and convolutions to Muon; embeddings, vectors and narrow ones to Adam.

        Args:
            named_parameters: what to update.
            num_steps: how often `step` will be called.
            matrix_rate: Muon's learning rate on the plateau.
            other_rate: Adam's.
            share_of_rate: which share of these a parameter gets, by its name.
            decay_share: the share of the steps over which the rates fall.
            betas: Adam's.
        """
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in named_parameters:
            # Embeddings are rows by token, not maps; fewer than 8 rows have little to even out.
            is_matrix = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= 8
            kind = (is_matrix and "embed" not in name, share_of_rate(name))
            groups.setdefault(kind, []).append(parameter)
        self._parameters = [parameter for group in groups.values() for parameter in group]
        self._optimizers: list[torch.optim.Optimizer] = []
        self._rates: list[float] = []
        for (for_muon, share), group in groups.items():
            rate = share * (matrix_rate if for_muon else other_rate)
            self._rates.append(rate)
            self._optimizers.append(
                Muon(group, rate) if for_muon else torch.optim.Adam(group, rate, betas)
            )
        self._num_steps, self._decay_share, self._done = num_steps, decay_share, 0
        self._mean_loss: float | None = None

    def steps(self, what: str, report: Report, every_seconds: float = 15.0) -> Iterator[int]:
        """Counts the steps; reports rate, time left and the running mean of the loss."""
        start = last = time.monotonic()
        for number in range(self._num_steps):
            yield number
            now = time.monotonic()
            if now - last > every_seconds or number + 1 == self._num_steps:
                last = now
                rate = (number + 1) / (now - start)
                left = (self._num_steps - number - 1) / rate
                report(
                    f"{what}: step {number + 1}/{self._num_steps}, {rate:.2f} steps/s, "
                    f"{left:.0f} s left, loss {self._mean_loss or float('nan'):.4f}"
                )

    def step(self, loss: Tensor) -> None:
        """Backpropagates a scalar loss and updates; gradients are clipped to a norm of 1."""
        left = 1 - self._done / self._num_steps
        self._done += 1
        # 30 steps of warm-up, a plateau, and a straight fall to a hundredth.
        factor = min(1.0, self._done / 30) * max(0.01, min(1.0, left / self._decay_share))
        for optimizer, rate in zip(self._optimizers, self._rates):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        value = float(loss.detach())
        self._mean_loss = (
            value if self._mean_loss is None else 0.98 * self._mean_loss + 0.02 * value
        )
