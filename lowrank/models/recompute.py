"""Activations computed again in the backward: all of a part of a block but its last projection.

The gradient of a projection needs its input, never its output, so there is nothing to gain from
multiplying by its weight again: `torch.utils.checkpoint` ends in front of it, and hands the input
that it computes again to the projection, too.   Chen et al., arXiv:1604.06174, §3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute(
    part: Callable[..., tuple[Tensor, ...]], last: nn.Module, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """(..., last(z)) for part(*inputs) = (..., z), of which only `inputs` are kept.

    And what `last` keeps beside z. Both run as they are; gradients are the same to the last bit.
    """
    *others, z = checkpoint(_with_last_kept, part, *inputs, use_reentrant=False)
    node = z.grad_fn
    if node is None:
        return *others, last(z)
    place, size = z.data_ptr(), z.nbytes

    def pack(kept: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        is_z = kept.data_ptr() == place and kept.nbytes == size
        return (kept.shape, kept.stride()) if is_z else kept

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        (again,) = node.saved_tensors
        return again.as_strided(*kept, again.storage_offset())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return *others, last(z)


class _Kept(torch.autograd.Function):
    """z, which its node keeps, and so the checkpoint around it computes again."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.view_as(z)

    @staticmethod
    def backward(ctx, dz: Tensor) -> Tensor:
        return dz


def _with_last_kept(part: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    *others, z = part(*inputs)
    return *others, _Kept.apply(z)
