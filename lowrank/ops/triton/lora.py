"""LoRA beside a frozen weight, dense or packed: the branch by our kernels, the base's product by
cuBLAS, or, for few rows over packed codes, by the fused kernels with the branch inside.

Launches of the forward: two over codes with few rows (h, then y with the branch in its epilogue;
three with several adapters); else h, y = branch + bias, and a GEMM that adds to y. Backward, in
order: g and the parts of dB, their sums, the branch's dx and the parts of dA, its sum, and the
base's product, which adds to dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.kernels import configs
from lowrank.ops import reference
from lowrank.ops.scratch import scratch

from .codebook import Branch, dequantize_into, dx_parts_into, fused_rows, linear_from_codes
from .launch import DOT, as_rows
from .lora_branch import adapters, dx_and_dA, expand, g_and_dB, shrink

_OLDEST = (8, 0)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [..., N] in the dtype of x, and h [M, R] float32."""
    args = (x, weight, absmax, absmax_scale, codebook, bias, block_size, A, B, scale, order)
    args += (offsets, p, seed)
    if x.numel() == 0 or B.numel() == 0:
        return reference.lora_linear(*args)
    rows = x.numel() // x.shape[-1]
    fused = codebook is not None and rows <= fused_rows(x.device, x.dtype)
    return lora_from_codes(*args) if fused else lora_through_blas(*args)


def lora_from_codes(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`lora_linear` for few rows, at least one, without a dense weight; y is rounded once."""
    rows, given = as_rows(x), adapters(A, B, scale, order, offsets, p, seed)
    h, parts = shrink(rows, given)
    if order is None:
        branch = Branch(None, parts, given.B, h, scale)
    else:
        addend = torch.empty(len(rows), B.shape[1], dtype=torch.float32, device=x.device)
        expand(h, parts, addend, None, x.dtype, given)
        branch = Branch(addend, None, None, None, scale)
    y = linear_from_codes(x, packed, absmax, absmax_scale, codebook, bias, block_size, branch)
    return y, h


def lora_through_blas(
    x: Tensor,
    weight: Tensor | None,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`lora_linear` with the base, if any, multiplied by cuBLAS: codes are decoded to scratch."""
    rows, given = as_rows(x), adapters(A, B, scale, order, offsets, p, seed)
    y = torch.empty(len(rows), B.shape[1], dtype=x.dtype, device=x.device)
    h, parts = shrink(rows, given)
    expand(h, parts, y, bias, x.dtype, given)
    if codebook is not None:
        with scratch((y.shape[1], x.shape[-1]), x.dtype, x.device) as w:
            dequantize_into(w, weight, absmax, absmax_scale, codebook, block_size)
            y.addmm_(rows, w.T)
    elif weight is not None:
        y.addmm_(rows, weight.T)
    return y.view(*x.shape[:-1], y.shape[1]), h


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    block_size: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the dtype of dy, dA and dB in that of A; [0] for what is not needed."""
    if dy.numel() == 0 or A.numel() == 0:
        return reference.lora_linear_backward(
            dy, x, h, weight, absmax, absmax_scale, codebook, block_size, A, B, scale, order,
            offsets, p, seed, needs,
        )  # fmt: skip
    rows, given = as_rows(dy), adapters(A, B, scale, order, offsets, p, seed)
    needs_dx, needs_dA, needs_dB = needs
    M, K = len(rows), A.shape[2]
    dx, dA = dy.new_empty(0), A.new_empty(0)
    g, dB = g_and_dB(rows, h if needs_dB else None, needs_dx or needs_dA, given)
    if g is None:
        return dx, dA, dB
    x = as_rows(x) if needs_dA else None
    if not needs_dx:
        return dx, dx_and_dA(x, g, None, dy.dtype, given), dB
    if codebook is not None and len(rows) <= fused_rows(dy.device, dy.dtype):
        parts = 1 + configs.dx_parts(len(weight))  # the first of them is the branch's
        sums = torch.empty(parts, M, K, dtype=torch.float32, device=dy.device)
        dA = dx_and_dA(x, g, sums[0], dy.dtype, given)
        dx = dx_parts_into(sums, rows, weight, absmax, absmax_scale, codebook, block_size)
        return dx.view(*dy.shape[:-1], K), dA, dB
    dx = dy.new_empty(M, K)
    dA = dx_and_dA(x, g, dx, dy.dtype, given)
    if codebook is not None:
        with scratch((len(weight), K), dy.dtype, dy.device) as w:
            dequantize_into(w, weight, absmax, absmax_scale, codebook, block_size)
            dx.addmm_(rows, w)
    elif weight is not None:
        dx.addmm_(rows, weight)
    return dx.view(*dy.shape[:-1], K), dA, dB


def _refuse(x: Tensor, *args) -> str | None:
    """x, or dy."""
    if x.dtype not in DOT:
        return f"takes float32, float16 and bfloat16; got {x.dtype}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < _OLDEST:
        return f"needs compute capability {_OLDEST} or newer, for TF32 and 99 KB of shared memory"
    return None


REFUSALS = {"lora_linear": _refuse, "lora_linear_backward": _refuse}
