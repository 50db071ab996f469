"""The processes of `torchrun`: joining them, and what they tell each other.

Without torchrun there is one process, rank 0, and every function here is a plain answer.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

JOINING_SECONDS = 300.0
"""How long the first process waits for the others to join."""

T = TypeVar("T")


@contextmanager
def processes() -> Iterator[int]:
    """Join the other processes of `torchrun`, and leave them at the end; yields this one's rank.

    Does nothing without torchrun, or where the processes have joined already. Tensors on a GPU
    travel over NCCL, those on the CPU over gloo.
    """
    ours = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_distributed()
    if ours:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, own, size = _store_of_this_attempt()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=size)
    try:
        yield rank()
    finally:
        if ours:
            dist.destroy_process_group()


def is_distributed() -> bool:
    """Whether there is more than this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process among all, from 0."""
    return dist.get_rank() if is_distributed() else 0


def num_processes() -> int:
    """How many there are."""
    return dist.get_world_size() if is_distributed() else 1


def from_first_process(value: T) -> T:
    """What the process of rank 0 holds, in every process; anything that can be pickled."""
    if not is_distributed():
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def of_all_processes(rows: list[int]) -> list[int]:
    """Concatenated in the order of the processes."""
    if not is_distributed():
        return rows
    gathered: list[list[int]] = [[] for _ in range(num_processes())]
    dist.all_gather_object(gathered, rows)
    return [row for own in gathered for row in own]


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor that every process holds."""
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / num_processes()


def complete_gradients(parameters: Sequence[Tensor]) -> None:
    """A gradient of zero where another process has one and this one's examples gave none."""
    if not is_distributed():
        return
    there = torch.tensor([float(p.grad is not None) for p in parameters])
    for parameter, share in zip(parameters, mean_over_processes(there).tolist()):
        if share and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Make every gradient the mean over processes, in one message."""
    if not is_distributed():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    # The same tensors in the same order everywhere: which have a gradient is the objective's doing.
    flat = mean_over_processes(torch.cat([grad.flatten() for grad in grads]))
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(part.view_as(grad))


def _store_of_this_attempt() -> tuple[dist.Store, int, int]:
    """A store that holds nothing of an attempt before a restart; rank; number of processes.

    torchrun keeps one store over all restarts, in which the addresses of dead processes would be
    found. So the first process names the attempt, and tells the name to those that live: each asks
    under a number of its own, so that no answer to a dead one is taken for its own.
    """
    store, own, size = next(rendezvous("env://"))
    if own != 0:
        number = uuid.uuid4().hex
        store.set(f"asking/{own}", number)
        # Waits for the answer to its own question.
        attempt = store.get(f"answer/{number}").decode()
        store.set(f"{attempt}/{own}", "")
        return dist.PrefixStore(attempt, store), own, size
    attempt, missing = uuid.uuid4().hex, list(range(1, size))
    deadline = time.monotonic() + JOINING_SECONDS
    # A process is there once it has written under the attempt's name: that it asked proves nothing,
    # since the question may be a dead one's.
    while missing:
        for other in missing:
            if store.check([f"asking/{other}"]):
                store.set(f"answer/{store.get(f'asking/{other}').decode()}", attempt)
        time.sleep(0.02)
        missing = [other for other in missing if not store.check([f"{attempt}/{other}"])]
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"of {size} processes, ranks {missing} did not join")
    return dist.PrefixStore(attempt, store), own, size
