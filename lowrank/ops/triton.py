"""Launches the Triton kernels: dequantize, and the products as dequantize into scratch + cuBLAS.

At training sizes decoding is a small part of the product (231 / M of it on an H200, by arithmetic),
so the product is left to cuBLAS. On a CPU these run only under Triton's interpreter
(TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lowrank.kernels.codebook_dequantize import codebook_dequantize_kernel

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OLDEST = (7, 5)  # Turing: what Triton compiles for
_TILE = 1024  # 8 elements for each of 128 threads: 16-byte stores straight from registers


def refuse(op: str, *args) -> str | None:
    """Why Triton will not run `op` on these arguments, or None if it will."""
    device = args[0].device
    if device.type != "cuda":
        return None if _INTERPRETED else f"runs on CUDA tensors; got one on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"needs compute capability {_OLDEST} or newer; {device} has {capability}"
    return None


def codebook_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] in `dtype`, double-quantized scales decoded in the same pass."""
    N = packed.shape[0]
    out = torch.empty(N, K, dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    tile = min(_TILE, triton.next_power_of_2(max(K, 32)))
    with torch.cuda.device(packed.device) if packed.is_cuda else nullcontext():
        codebook_dequantize_kernel[(N, triton.cdiv(K, tile))](
            packed.contiguous(),
            absmax.contiguous(),
            None if absmax_scale is None else absmax_scale.contiguous(),
            codebook.contiguous(),
            out,
            K,
            packed.shape[1],
            absmax.shape[1],
            16 if codebook.shape[0] > 1 else 0,
            G=block_size,
            BLOCK_K=tile,
            enable_fp_fusion=False,  # absmax = code * step + offset rounds twice
        )
    return out


def codebook_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """y = x Wᵀ + b for x [..., K]: [..., N]. W is scratch in the dtype of x, freed on return."""
    K = x.shape[-1]
    w = codebook_dequantize(packed, absmax, absmax_scale, codebook, K, block_size, x.dtype)
    return F.linear(x, w, bias)


def codebook_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
) -> Tensor:
    """dx = dy W for dy [..., N]: [..., K]. W is scratch in the dtype of dy, freed on return."""
    w = codebook_dequantize(packed, absmax, absmax_scale, codebook, K, block_size, dy.dtype)
    return dy @ w
