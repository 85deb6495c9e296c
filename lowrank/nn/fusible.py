"""Which base layers `ops.lora_linear` can compute by itself, and what it takes of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.nn.autocast import is_autocast_on, linear_dtype
from lowrank.nn.quant_linear import QuantLinear
from lowrank.ops.cpu.matrix_units import multiplies_bfloat16

# (weight, absmax, absmax_scale, codebook), bias, block size
Base = tuple[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], Tensor | None, int]

NO_BASE: Base = ((None, None, None, None), None, 64)


def fusible_base(base: nn.Module, x: Tensor) -> Base | None:
    """The operands of y = x Wᵀ + b, or None where calling `base` may be anything else.

    That is a subclass, a parametrized, hooked or patched layer, a weight that is trained, or a
    quantizer that is not over a codebook, or computes in another dtype than x has.
    """
    if is_patched(base):
        return None
    if type(base) is nn.Linear:
        return None if base.weight.requires_grad else _dense(base, x)
    if type(base) is QuantLinear:
        return _quantized(base, x)
    return None


def _dense(base: nn.Linear, x: Tensor) -> Base:
    weight, bias = base.weight, base.bias
    if is_autocast_on(x.device.type):  # else another dtype is the caller's mistake
        dtype = linear_dtype(x)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return (weight, None, None, None), bias, 64


def _quantized(base: QuantLinear, x: Tensor) -> Base | None:
    dtype = linear_dtype(x)
    operands = getattr(base.quantizer, "codebook_operands", None)
    if operands is None or base.compute_dtype not in (None, dtype):
        return None
    *weight, block_size = operands(base.storage)
    return tuple(weight), None if base.bias is None else base.bias.to(dtype), block_size


def is_patched(base: nn.Module) -> bool:
    """Whether calling it does something else than its class says."""
    state = base.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def quick_dtype(base: nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """`dtype`, if a few float32 rows are multiplied faster in it; they are rounded to it then."""
    weight = next(base.parameters())
    same = isinstance(base, QuantLinear) or weight.dtype == dtype
    if torch.compiler.is_compiling() or not same or dtype.itemsize != 2:
        return None
    return dtype if weight.device.type != "cpu" or multiplies_bfloat16(dtype) else None
