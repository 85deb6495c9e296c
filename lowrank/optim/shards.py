"""Tensors of which each process has some rows: torch's DTensor, taken apart and put together."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which takes a second to import and is asked for nobody else."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """What this process has of it, its very memory; the tensor itself if it is whole."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, apart from autograd. Every process has to ask for it."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """A view of what this process has of a whole tensor that is cut as `like` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(
        tensor.shape, like.device_mesh, like.placements
    )
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        tensor = tensor.narrow(dim, min(start, tensor.shape[dim]), size)
    return tensor


def bounds(rows: int, like: Tensor) -> tuple[int, int]:
    """Which of so many rows this process has of what is cut as `like` is: from, and up to."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(
        (rows,), like.device_mesh, like.placements
    )
    return min(starts[0], rows), min(starts[0] + sizes[0], rows)


def sharded(local: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The tensor of that `shape`, cut as `like` is, of which this process has `local`."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # not from_local: it would move to the mesh's device what is kept in host memory
    stride = torch.empty(shape, device="meta").stride()
    meta = TensorMeta(torch.Size(shape), stride, local.dtype)
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as `like` is: a copy of this process's share, or the tensor itself."""
    if not is_sharded(like):
        return tensor
    return sharded(share(tensor, like).clone(), tuple(tensor.shape), like)


@torch.no_grad()
def put(tensor: Tensor, place: Tensor) -> None:
    """Copy a whole tensor into `place`, of which this process may have a part."""
    local(place).copy_(share(tensor, place))
