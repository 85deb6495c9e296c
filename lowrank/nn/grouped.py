"""Products of groups of rows, each with a weight of its own, in any dtype and of any size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

from lowrank.nn.autocast import linear_dtype


def grouped_mm(x: Tensor, weights: Any, *, offs: Tensor) -> Tensor:
    """Rows offs[e - 1] to offs[e] of x [M, K] times weights[e], [M, N]; rows beyond are zeros.

    weights [E, K, N], or what stands for them (`LikeWeights`); offs int [E], best on the CPU, where
    the sizes of groups are known. F.grouped_mm is the same for sizes in steps of 16 bytes, and has
    no float64.
    """
    if torch.compiler.is_compiling():  # no graph knows how many rows a group has
        return torch.compiler.disable(grouped_mm)(x, weights, offs=offs)
    if has_torch_function_unary(weights):
        return handle_torch_function(grouped_mm, (weights,), x, weights, offs=offs)
    dtype = linear_dtype(x)
    return _Grouped.apply(x.to(dtype), weights.to(dtype), [0, *offs.tolist()])


class _Grouped(torch.autograd.Function):
    """Keeps x only for weights that are trained; their gradient is one tensor, not one a group."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, edges: list[int]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights)
        ctx.edges = edges
        return _product(x, weights, edges)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights = ctx.saved_tensors
        dx = dweights = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, weights.mT, ctx.edges)
        if ctx.needs_input_grad[1]:
            dweights = torch.zeros(weights.shape, dtype=weights.dtype, device=weights.device)
            for e, (start, end) in enumerate(pairwise(ctx.edges)):
                if start < end:
                    torch.mm(x[start:end].T, dy[start:end], out=dweights[e])
        return dx, dweights, None


def _product(x: Tensor, weights: Tensor, edges: list[int]) -> Tensor:
    y = x.new_empty(len(x), weights.shape[-1])
    for e, (start, end) in enumerate(pairwise(edges)):
        if start < end:
            torch.mm(x[start:end], weights[e], out=y[start:end])
    y[edges[-1] :] = 0
    return y
