"""Fully sharded data parallelism: each process holds a part of every weight, gradient and optimiser state (FSDP2).

Knows how a model is cut into units and put together again. Does not know data, steps or checkpoints' files.

torch's `fully_shard` is applied here and not by accelerate, which cuts embeddings and LM head into two units: torch
refuses that where encoder, decoder and head share one matrix. Nor does accelerate shard on CPUs, where it is tested.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def take_launchers_wish() -> bool:
    """Whether `accelerate launch` was told to use FSDP; its own implementation is switched off, this one is used."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def shard(model: torch.nn.Module, device: torch.device, compute: torch.dtype = torch.float32) -> None:
    """Cut `model`, the same in every process, into units: one a layer, and one for the rest.

    Args:
        compute: dtype in which weights are gathered and used; gradients are reduced, and masters kept, in fp32.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            distributed.broadcast(parameter, src=0)
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules of the outermost module lists; not those that share a parameter with anything outside themselves."""
    lists: list[torch.nn.ModuleList] = []

    def collect(module: torch.nn.Module) -> None:
        for child in module.children():
            if isinstance(child, torch.nn.ModuleList):
                lists.append(child)
            else:
                collect(child)

    collect(model)
    # Every place of a parameter, also of one that has several names.
    places = [id(p) for _, module in model.named_modules() for p in module.parameters(recurse=False)]
    found = []
    for layer in (layer for layers in lists for layer in layers):
        inside = [id(p) for module in layer.modules() for p in module.parameters(recurse=False)]
        if inside and all(places.count(place) == inside.count(place) for place in set(inside)):
            found.append(layer)
    return found


@contextmanager
def full_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every process has all weights, so that it may call the model as often as it likes; e.g. to generate."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            # As `fully_shard` sets it: the root is needed again at once when the backward pass begins.
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def full_state(state: Any) -> Any:
    """A state dict, or an optimiser's, with whole tensors on the CPU in place of parts. All processes must call it."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, Mapping):
        return {key: full_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [full_state(value) for value in state]
    return state


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict likewise; names that share a weight share it still, so that it is saved once."""
    weights = {name: id(weight) for name, weight in model.named_parameters(remove_duplicate=False)}
    whole: dict[int | str, torch.Tensor] = {}
    state = {}
    for name, part in model.state_dict().items():
        key = weights.get(name, name)
        if key not in whole:
            whole[key] = full_state(part)
        state[name] = whole[key]
    return state


def load_full_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put whole tensors into a model that is cut up. Names that share a tensor may stand there once.

    Raises:
        KeyError: a name that the model does not have.
    """
    parts = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            parts[name].copy_(_like(tensor, parts[name]))


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The same for an optimiser, whose state `torch.optim.Optimizer.state_dict` names by parameters' numbers."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {
            name: _like(value, parameters[number]) if getattr(value, "ndim", 0) else value
            for name, value in held.items()
        }
        for number, held in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _like(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    if not isinstance(part, DTensor):
        return tensor.to(part.device)
    return distribute_tensor(tensor.to(part.device), part.device_mesh, part.placements)
