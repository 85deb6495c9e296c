"""y = x Wᵀ + b for any quantizer: its own `linear` if it has one, else through `dequantize`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lowrank.errors import ShapeError
from lowrank.ops.checks import ACTIVATIONS, check_device, check_dtype, check_tensors

from .blocks import panels
from .registry import Quantizer
from .rows import decodes_rows, dequantize_rows
from .storage import Storage


def linear(quantizer: Quantizer, x: Tensor, storage: Storage, bias: Tensor | None = None) -> Tensor:
    """y [..., N] in the dtype of x [..., K], differentiable in x and bias.

    A scheme that is row-local, or has `dequantize_rows`, is dequantized some rows at a time, a few
    MB, in the forward and in the backward; another as a whole. Between the two only the storage's
    tensors are kept, compiled or not: torch.compile breaks its graph here.
    """
    check_tensors(x=x)
    if x.shape[-1:] != tuple(storage.shape[1:]):
        raise ShapeError(f"x: expected [..., K={storage.shape[1]}]; got {list(x.shape)}")
    fast = getattr(quantizer, "linear", None)
    if fast is not None:
        return fast(x, storage, bias)
    check_dtype("x", x, ACTIVATIONS)
    check_device("x", x, next(iter(storage.tensors.values())).device)
    if bias is not None:
        check_tensors(bias=bias)
        if bias.shape != tuple(storage.shape[:1]):
            raise ShapeError(f"bias: expected [N={storage.shape[0]}]; got {list(bias.shape)}")
    apply = _DequantizedLinear.apply
    if torch.compiler.is_compiling():  # a compiler would keep the dense weight for the backward
        apply = torch.compiler.disable(apply)
    return apply(x, bias, quantizer, storage, *storage.tensors.values())


class _DequantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, quantizer, storage, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.quantizer, ctx.storage = (
            quantizer,
            replace(storage, tensors=dict.fromkeys(storage.tensors)),
        )
        dtype, (N, K) = _compute_dtype(x), storage.shape
        rows_of_x = x.reshape(-1, K).to(dtype)  # [M, K]
        y = rows_of_x.new_empty(rows_of_x.shape[0], N)
        bias = y.new_zeros(N) if bias is None else bias.to(dtype)
        for start, stop, w in _panels(quantizer, storage, dtype):
            torch.addmm(bias[start:stop], rows_of_x, w.T, out=y[:, start:stop])
        return y.to(x.dtype).view(*x.shape[:-1], N)

    @staticmethod
    def backward(ctx, dy):
        dx = dbias = None
        saved = ctx.saved_tensors  # once: checkpointing gives them no second time
        if ctx.needs_input_grad[0]:
            tensors = dict(zip(ctx.storage.tensors, saved, strict=True))
            storage = replace(ctx.storage, tensors=tensors)
            dtype, (N, K) = _compute_dtype(dy), storage.shape
            rows_of_dy = dy.reshape(-1, N).to(dtype)  # [M, N]
            # summed in float32: a 16-bit sum would be rounded at each panel
            wide = torch.promote_types(dtype, torch.float32)
            dx = rows_of_dy.new_zeros(rows_of_dy.shape[0], K, dtype=wide)
            for start, stop, w in _panels(ctx.quantizer, storage, dtype):
                if wide == dtype:
                    dx.addmm_(rows_of_dy[:, start:stop], w)
                else:
                    dx += rows_of_dy[:, start:stop] @ w
            dx = dx.to(dy.dtype).view(*dy.shape[:-1], K)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dbias, None, None, *(None for _ in saved)


def _panels(
    quantizer: Quantizer, storage: Storage, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, the weight's rows from start to stop in `dtype`) over all rows."""
    N, K = storage.shape
    if not decodes_rows(quantizer):
        yield 0, N, quantizer.dequantize(storage, dtype)
        return
    device = next(iter(storage.tensors.values())).device
    for start, stop in panels(N, K, device):
        yield start, stop, dequantize_rows(quantizer, storage, start, stop, dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    # torch's 16-bit matmuls on CPUs without such units are over 100 times slower than float32
    return torch.float32 if x.device.type == "cpu" and x.dtype.itemsize == 2 else x.dtype
