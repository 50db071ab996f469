"""Which device is computed on, and the ways there and back that do not keep it waiting."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from gill_errors import InputError

Row = TypeVar("Row")


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU; anything else as torch spells it.

    Raises InputError for one that torch does not know, or this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the device {name!r} cannot be used: {reason}") from None
    return device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on its way to `device`: what is computed from it there waits for it, Python does
    not. A GPU copies by itself, out of page-locked memory."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    with torch.cuda.device(device):  # threads other than the main one begin with the first GPU
        return tensor.pin_memory().to(device, non_blocking=True)


def sent_together(
    numbers: Sequence[Sequence[int] | Int64[Tensor, " _"]], device: torch.device
) -> list[Int64[Tensor, " _"]]:
    """Lists of whole numbers as vectors on `device`, in one copy."""
    vectors = [torch.as_tensor(one, dtype=torch.int64) for one in numbers]
    return list(sent(torch.cat(vectors), device).split([len(one) for one in vectors]))


def groups_sent_together(
    groups: Sequence[Sequence[Sequence[int] | Int64[Tensor, " _"]]], device: torch.device
) -> list[list[Int64[Tensor, " _"]]]:
    """`sent_together` of several groups of lists, all in one copy."""
    arrived = iter(sent_together([one for group in groups for one in group], device))
    return [[next(arrived) for _ in group] for group in groups]


SHAPES_COST = ("cuda",)
"""Devices whose libraries plan anew for a shape that they have not had: more than padding takes."""


def filled_up(batch: Sequence[Row], size: int, device: torch.device) -> list[Row]:
    """A batch of `size` rows where a new shape costs more: behind its own the last one, repeated.

    The end of a shard, or a row that could not be read, else gives a batch of another size.
    """
    missing = size - len(batch) if device.type in SHAPES_COST else 0
    return [*batch, *[batch[-1]] * missing]


def captured(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`work`, to be done again and again on tensors that stay where they are; its result does too.

    On a GPU as a graph, which is played without Python; `work` is done a few times to make it, must
    ask for no number and send none. Raises RuntimeError where the device cannot.
    """
    if device.type != "cuda":
        return work
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their kernels before the capture
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may go on
            result = work()

    def play() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return play


class Arriving:
    """Numbers on their way from a GPU: an array to NumPy, which waits when it looks at them.

    The GPU can do the next batch meanwhile. bfloat16, which NumPy lacks, arrives as `narrowed`.
    """

    def __init__(self, tensor: Tensor, narrowed: torch.dtype = torch.float32) -> None:
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.to(narrowed)
        self.shape = tuple(tensor.shape)
        self._tensor = tensor.detach().to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            with torch.cuda.device(tensor.device):
                self._arrived = torch.cuda.Event()
                self._arrived.record()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._arrived is not None:
            self._arrived.synchronize()
        return np.array(self._tensor.numpy(), dtype, copy=copy)


def multiply_in_tf32(device: torch.device) -> None:
    """Let this process multiply float32 matrices in TF32 on a GPU: eight times faster, and as exact
    as float16 is. For what is stored in float16 anyway."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def rounding_error(dtype: torch.dtype) -> float:
    """How far what a model gives may be, over its largest number, from the same computed in another
    way: what is further apart is something else."""
    return 1e-3 if torch.finfo(dtype).bits >= 32 else 5e-2


def set_up(device: str, threads: int) -> torch.device:
    """Set torch's threads and quieten the libraries; gives the device to compute on."""
    torch.set_num_threads(threads)
    quieten_libraries()
    return pick_device(device)


def quieten_libraries() -> None:
    """No bars for loading small files and no warning per cut prompt; errors still show.

    Of the libraries that were imported by now: to import one for this would cost seconds.
    """
    for library in {"transformers", "diffusers"} & sys.modules.keys():
        logging = import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
