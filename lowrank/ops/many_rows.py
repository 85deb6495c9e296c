"""Linear layers of one x, tens or hundreds of rows of it, over weights that were looked at once.

A step of a small model takes 200 products of 0.5 ms each way; asking for one by one through an
operator takes as long again as a third of that. Here several layers are one node of the graph,
and kernels get the addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .cpu.codebook import is_decoded_once
from .few_rows import MOST_ROWS


class Layer(NamedTuple):
    """y = x Wᵀ + b + scale * (x Aᵀ) Bᵀ of a weight [N, K] in codes; A and B None without a branch.

    All plain, contiguous and of the CPU, floats in float32 or as their bits.
    """

    weight: tuple[Tensor, Tensor, Tensor | None, Tensor]  # packed, absmax, absmax_scale, codebook
    sizes: tuple[int, int, int, int]  # rows of the codebook, N, K, block size
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    scale: float

    @property
    def K(self) -> int:
        return self.sizes[2]


def takes(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether x [..., K], plain and contiguous, has as many rows as are multiplied so."""
    if x.dtype is not torch.float32 or x.numel() <= MOST_ROWS * x.shape[-1]:
        return False
    if any(layer.bias is not None and layer.bias.requires_grad for layer in layers):
        return False
    return all(is_decoded_once(x, layer.sizes[1]) for layer in layers)


def products(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """y [..., N] of each layer, differentiable once in x and in every A and B."""
    factors = [t for layer in layers for t in (layer.A, layer.B)]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *factors):
        return list(_Products.apply(x, layers, *factors))
    return _forward(x, layers)[0]


class _Products(torch.autograd.Function):
    """`products`; x is kept for a dA alone, h = x Aᵀ for its dB alone, weights for dx alone."""

    @staticmethod
    def forward(ctx, x: Tensor, layers: Sequence[Layer], *factors: Tensor | None):
        ys, hs = _forward(x, layers)
        needs_dx, _, *needs = ctx.needs_input_grad
        hs = [h if need else None for h, need in zip(hs, needs[1::2], strict=True)]
        weights = [t for layer in layers for t in layer.weight]
        ctx.save_for_backward(x if any(needs[::2]) else None, *hs, *factors, *weights)
        if not needs_dx:
            pairs = zip(ys, needs[::2], needs[1::2], strict=True)
            ctx.mark_non_differentiable(*(y for y, *needed in pairs if not any(needed)))
        ctx.shape, ctx.rest = x.shape, [(layer.sizes, layer.scale) for layer in layers]
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor):
        x, *saved = ctx.saved_tensors
        (needs_dx, _, *needs), count = ctx.needs_input_grad, len(dys)
        hs, factors, weights = saved[:count], saved[count : 3 * count], saved[3 * count :]
        dx = dys[0].new_empty(ctx.shape) if needs_dx else None
        gradients = [
            torch.empty_like(factor) if need else None
            for factor, need in zip(factors, needs, strict=True)
        ]
        for i, (dy, (sizes, scale)) in enumerate(zip(dys, ctx.rest, strict=True)):
            (A, B), (dA, dB) = (t[2 * i : 2 * i + 2] for t in (factors, gradients))
            if dx is dA is dB is None:
                continue
            dy = dy.contiguous()
            lora = None if A is None else _lora(A, B, hs[i], scale)
            status = native.load_cpu().lowrank_codebook_lora_backward(
                dy.data_ptr(), _pointer(x), ctx.shape[:-1].numel(),
                *map(_pointer, weights[4 * i : 4 * i + 4]), *sizes, lora, _pointer(dx), i > 0,
                _pointer(dA), _pointer(dB), torch.get_num_threads(),
            )  # fmt: skip
            native.check(status, "codebook_lora_backward")
        return dx, None, *gradients


def _forward(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor | None]]:
    """(y of each, h [M, R] of each)."""
    ys, hs, M = [], [], x.numel() // x.shape[-1]
    library, threads = native.load_cpu(), torch.get_num_threads()
    for weight, sizes, bias, A, B, scale in layers:
        y = x.new_empty((*x.shape[:-1], sizes[1]))
        h = None if A is None else x.new_empty((M, A.shape[0]))
        given = x.data_ptr(), 0, M, *map(_pointer, weight), *sizes, _pointer(bias)
        if A is None:
            status = library.lowrank_codebook_linear(*given, y.data_ptr(), threads)
        else:
            lora = _lora(A, B, h, scale)
            status = library.lowrank_codebook_lora_linear(*given, lora, y.data_ptr(), threads)
        native.check(status, "codebook_lora_linear")
        ys.append(y)
        hs.append(h)
    return ys, hs


def _lora(A: Tensor, B: Tensor, h: Tensor | None, scale: float) -> object:
    return ctypes.byref(
        native.Lora(A.data_ptr(), B.data_ptr(), _pointer(h), A.shape[0], scale, None)
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
