"""A frozen language model larger than one card, spread over the processes of `torchrun` (FSDP).

Every process keeps its share of each decoder layer. A layer is gathered when it is called, forwards
or backwards, and given up again; nothing of it is ever trained. What stands outside the layers
(embedding rows, final norm, output rows) is whole in every process, as the heads are: the losses
and the [IMG] rows read it directly.

Only the first process reads the files, into its own memory; every device receives its shares alone.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from gill_errors import GillError
from pipeline.frozen.backbones import BackboneError, ChatSettings
from pipeline.frozen.language_model import LanguageModel, load_language_model
from pipeline.training.distribution import from_first_process, is_distributed, num_processes, rank
from pipeline.training.recomputation import decoder_layers


class ShardingError(GillError):
    """A language model cannot be sharded here; the message says why."""


def load_sharded_language_model(
    path_or_id: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    chat: ChatSettings | None = None,
) -> LanguageModel:
    """`load_language_model` with the decoder layers spread over all processes; all call it.

    The other processes need not have the files. Every pass of the model is from now on a common
    one: all processes run equally many, in the same order.

    Raises:
        BackboneError: the model cannot serve; the message says why.
        ShardingError: there is only one process.
    """
    if not is_distributed():
        raise ShardingError(
            "run.shard_language_model spreads the language model over several processes, but "
            "there is only one: start with torchrun"
        )
    # An error is sent round like a model, so that no process waits for one that has stopped.
    found: tuple[Any, Any, Any] | BackboneError | None = None
    whole = None
    if rank() == 0:
        try:
            whole = load_language_model(path_or_id, dtype, "cpu", chat=chat)
            found = (whole.model.config, whole.tokenizer, whole.num_rows)
        except BackboneError as error:
            found = error
    found = from_first_process(found)
    if found is None or isinstance(found, BackboneError):
        raise found or BackboneError(f"{path_or_id}: the first process read nothing")
    config, tokenizer, num_rows = found
    source = None if whole is None else whole.model
    model = _distribute(source, config, dtype, torch.device(device))
    return LanguageModel(model, tokenizer, num_rows, chat)


def is_sharded(language_model: LanguageModel) -> bool:
    """Whether its layers are spread over processes."""
    return any(isinstance(p, DTensor) for p in language_model.model.parameters())


def _distribute(
    source: nn.Module | None, config: Any, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A sharded copy of the first process's `source` on `device`; None in the other processes."""
    # Without memory: each process allocates its shares only, once the layers are cut.
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    # Of some architectures a layer returns a view; nothing here writes into it.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = init_device_mesh(device.type, (num_processes(),))
    layers = decoder_layers(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # The stack holds no share itself: it makes its layers one group, which gathers ahead.
    stack, inside = _stack(model, layers), {p for layer in layers for p in layer.parameters()}
    outside = {p for p in stack.parameters() if p not in inside}
    fully_shard(stack, mesh=mesh, ignored_params=outside)
    # Real memory without numbers, tied tensors parted; tied again, each is then filled once. By
    # name, as buffers that no state dict holds (rotary frequencies) have to come too.
    model.to_empty(device=device)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        _fill(parameter, None if source is None else source.get_parameter(name), mesh)
    for name, buffer in model.named_buffers():
        _fill(buffer, None if source is None else source.get_buffer(name), mesh)
    return model


def _stack(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """The module that calls the layers: OPT's is within its base model, which may be passed by."""
    (name,) = [name for name, module in model.named_modules() if module is layers[0]]
    return model.get_submodule(name.rsplit(".", 2)[0])


@torch.no_grad()
def _fill(place: Tensor, whole: Tensor | None, mesh: DeviceMesh) -> None:
    """Put the first process's `whole` into `place`, each process its own share."""
    local = place.to_local() if isinstance(place, DTensor) else place
    if whole is None:
        # Room to receive in, of the global shape; its content is never read.
        whole = torch.empty(place.shape, dtype=place.dtype, device=local.device)
    else:
        whole = whole.to(local.device, place.dtype)
    if isinstance(place, DTensor):
        # Scatters the first process's tensor along the shards.
        local.copy_(distribute_tensor(whole, mesh, place.placements).to_local())
    else:
        dist.broadcast(whole, src=0)
        local.copy_(whole)
