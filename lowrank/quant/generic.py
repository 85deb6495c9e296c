"""y = x Wᵀ + b for any quantizer: its own `linear` if it has one, else through `dequantize`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .registry import Quantizer
from .storage import Storage


def linear(quantizer: Quantizer, x: Tensor, storage: Storage, bias: Tensor | None = None) -> Tensor:
    """y [..., N] in the dtype of x [..., K], differentiable in x and bias."""
    fast = getattr(quantizer, "linear", None)
    if fast is not None:
        return fast(x, storage, bias)
    return _DequantizedLinear.apply(x, bias, quantizer, storage, *storage.tensors.values())


class _DequantizedLinear(torch.autograd.Function):
    """Forward and backward each dequantize: between them only the storage's tensors are kept."""

    @staticmethod
    def forward(ctx, x, bias, quantizer, storage, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.quantizer, ctx.storage = (
            quantizer,
            replace(storage, tensors=dict.fromkeys(storage.tensors)),
        )
        dtype = _compute_dtype(x)
        weight = quantizer.dequantize(storage, dtype)
        return torch.nn.functional.linear(x.to(dtype), weight, _cast(bias, dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            tensors = dict(zip(ctx.storage.tensors, ctx.saved_tensors, strict=True))
            dtype = _compute_dtype(dy)
            weight = ctx.quantizer.dequantize(replace(ctx.storage, tensors=tensors), dtype)
            dx = (dy.to(dtype) @ weight).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dbias, None, None, *(None for _ in ctx.saved_tensors)


def _compute_dtype(x: Tensor) -> torch.dtype:
    # torch's 16-bit matmuls on CPUs without such units are over 100 times slower than float32
    return torch.float32 if x.device.type == "cpu" and x.dtype.itemsize == 2 else x.dtype


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
