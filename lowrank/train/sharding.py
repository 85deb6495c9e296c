"""A model of which every process holds a part: FSDP2 over its blocks, and what is whole at times.

arXiv:2304.11277. What is frozen lies in integers: no policy casts them, and no gradient travels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank.errors import ConfigError
from lowrank.optim.shards import is_sharded, put, whole
from lowrank.train.weights import shared_tensors


def shard(
    model: nn.Module,
    cpu_offload: bool = False,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> nn.Module:
    """Cut every parameter into rows, one part for each process of `group` (None: all of them).

    Each block of the model, a child of an nn.ModuleList, is whole while it computes, and again in
    its backward; what is outside of blocks while the model computes. With `cpu_offload` the parts
    lie in host memory. `options` are fully_shard's own, such as mp_policy. Gradients are summed
    over the processes, not averaged. Returns the model.

    Adapters have to be there before, and torch.distributed initialised. ConfigError if not. Of a
    model that was loaded `sharded`, each process then reads its part.
    """
    if not dist.is_initialized():
        raise ConfigError(
            "shard: expected torch.distributed to be initialised; start with torchrun, or call "
            "torch.distributed.init_process_group() before"
        )
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        fully_shard,
        register_fsdp_forward_method,
    )

    device = _device_of(model)
    mesh = DeviceMesh.from_group(group or dist.group.WORLD, device.type)
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    blocks = list(blocks_of(model))
    if any(isinstance(module, FSDPModule) for module in (model, *blocks)):
        raise ConfigError("shard: expected a whole model; got one that is sharded already")
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, **options)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    unread = getattr(model, "unread", None)
    if unread is not None:
        unread.fill(model)
        model.unread = None
    if hasattr(model, "loss"):
        register_fsdp_forward_method(model, "loss")
    return model


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """What repeats in it: the children with parameters of the outermost nn.ModuleLists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks_of(child)


def compile_blocks(model: nn.Module, backend: str) -> None:
    """Have torch.compile compile the forward of every block; what gathers its weights stays out."""
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend)


def rest(model: nn.Module) -> None:
    """After a forward without a backward: have what is outside of the blocks in parts again."""
    if hasattr(model, "reshard"):
        model.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module, first: bool = True, back: bool = False) -> Iterator[None]:
    """What is trained, adapters and other, is whole inside, on the CPU; all processes come along.

    It has values where this is the `first` process; others only take part. With `back` every one
    has values, and what they are in the end is what is trained. A model that is not sharded is left
    as it is.
    """
    trained = {id(tensor) for tensor in shared_tensors(model)}
    found: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    wholes: dict[int, nn.Parameter] = {}  # of each, though two modules share it
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or id(p) not in trained or not is_sharded(p):
                continue
            if id(p) not in wholes:
                tensor, kept = whole(p), first or back
                wholes[id(p)] = nn.Parameter(tensor.cpu(), p.requires_grad) if kept else p
                del tensor
            found.append((module._parameters, name, p))
    try:
        for parameters, name, p in found:
            parameters[name] = wholes[id(p)]
        yield
    finally:
        for parameters, name, p in found:
            if back:
                put(parameters[name].detach(), p)
            parameters[name] = p


def wholes(tensors: Mapping[str, Any], first: bool) -> dict[str, Any]:
    """The values of a tree of dicts with sharded tensors in it whole, on the CPU of the first."""
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            found[name] = wholes(value, first)
        elif isinstance(value, Tensor) and is_sharded(value):
            tensor = whole(value)
            if first:
                found[name] = tensor.cpu()
        else:
            found[name] = value
    return found


def _device_of(model: nn.Module) -> torch.device:
    devices = {getattr(p, "computes_on", p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise ConfigError(
            f"shard: expected a model on one device; got {', '.join(sorted(map(str, devices)))}"
        )
    return devices.pop()
