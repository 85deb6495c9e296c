"""Codes to weights and back, and the products of a quantized weight.

Up to 16 rows are multiplied straight from packed codes. For more, the weight is decoded into a
reused scratch and cuBLAS multiplies; so is every dX.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.ops import native
from lowrank.ops.scratch import scratch

from . import launch
from .launch import Weight
from .refusals import refuse_codebook, refuse_devices, refuse_dtype, refuse_weight

_MOST_FUSED_ROWS = 16  # LOWRANK_CUDA_MOST_ROWS
_MOST_FUSED_COLUMNS = 1 << 30  # the kernel counts columns in 32 bits
_CHUNK = 64  # columns that it takes at a time


def codebook_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 absmax of weight [N, K]; only its rows need to be contiguous."""
    N, K = weight.shape
    if (K > 1 and weight.stride(1) != 1) or (N > 1 and weight.stride(0) < K):
        weight = weight.contiguous()
    codebook = codebook.contiguous()
    packed = torch.empty(N, (K + 31) // 32 * 16, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(N, -(-K // block_size), dtype=torch.float32, device=weight.device)
    launch.launch(
        "codebook_quantize", weight.device, weight.data_ptr(), native.DTYPES[weight.dtype], N, K,
        weight.stride(0), codebook.data_ptr(), codebook.shape[0], block_size, packed.data_ptr(),
        absmax.data_ptr(),
    )  # fmt: skip
    return packed, absmax


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
    out = torch.empty(packed.shape[0], K, dtype=dtype, device=packed.device)
    _dequantize_into(out, (packed, absmax, absmax_scale, codebook), block_size)
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
    """y = x Wᵀ + b for x [..., K]: [..., N] in the dtype of x."""
    K = x.shape[-1]
    weight = (packed, absmax, absmax_scale, codebook)
    if x.shape[:-1].numel() <= most_fused_rows(x.device, x.dtype) and K <= _MOST_FUSED_COLUMNS:
        return linear_from_codes(x, *weight, bias, block_size)
    with scratch((packed.shape[0], K), x.dtype, x.device) as w:
        _dequantize_into(w, weight, block_size)
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
    """dx = dy W for dy [..., N]: [..., K] in the dtype of dy."""
    with scratch((packed.shape[0], K), dy.dtype, dy.device) as w:
        _dequantize_into(w, (packed, absmax, absmax_scale, codebook), block_size)
        return dy @ w


def most_fused_rows(device: torch.device, dtype: torch.dtype) -> int:
    """The most rows that `codebook_linear` multiplies from packed codes: by arithmetic, 16."""
    return _MOST_FUSED_ROWS if dtype in native.DTYPES else 0


def linear_from_codes(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """`codebook_linear` for up to 16 rows, without a dense weight.

    y[m, n] = unit Σ_b absmax[n, b] (Σ_k∈b c[code[n, k]] x[m, k]) + bias[n], both sums in float32,
    where c is the codebook over `unit`, the power of two next below its largest magnitude, rounded
    to the dtype of x. A product with 16-bit x is exact in float32, so c alone is what differs from
    the float32 weight: by 2^-8 |c| at most in bfloat16, 2^-11 |c| or 2^-25 in float16. The sums and
    y are rounded too. For float32 x nothing else is: c is exact and unit is 1. A row of y has the
    same bits whatever other rows x has.

    A warp issues so many instructions for each value that a lane decodes (double-quantized scales,
    blocks of 64 or more, counted in the loop's machine code for sm_90 and sm_80): 16-bit x 3.2 up
    to M = 4, 2.7 up to 8 and wherever 32 rows a thread block fill the device, 3.1 up to 16; float32
    x 3.7, 4.9, 7.7, 13 and 23 for M = 1, 2, 4, 8 and 16. Reading codes at the full speed of an H200
    leaves 3.6 to 4. Some 400 more a lane make the table and add the sums, whatever K.
    Before Ampere, 16-bit x is multiplied as float32.
    """
    N, K = packed.shape[0], x.shape[-1]
    if x.dtype != torch.float32 and not launch.has_tensor_cores(x.device):
        bias = None if bias is None else bias.float()
        weight = (packed, absmax, absmax_scale, codebook)
        return linear_from_codes(x.float(), *weight, bias, block_size).to(x.dtype)
    rows = _rows_in_chunks(x)
    weight = launch.contiguous((packed, absmax, absmax_scale, codebook))
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    launch.launch(
        "codebook_linear", x.device, rows.data_ptr(), native.DTYPES[x.dtype], rows.shape[0],
        rows.stride(0), *launch.pointers(weight), N, K, block_size,
        None if bias is None else bias.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


def _rows_in_chunks(x: Tensor) -> Tensor:
    """x [..., K] as [M, K up to a multiple of 64], aligned as the kernel reads: itself if it is."""
    rows = x.reshape(-1, x.shape[-1])
    pad = -rows.shape[1] % _CHUNK
    if pad:
        return F.pad(rows, (0, pad))
    whole = rows.stride(0) * rows.itemsize % 16 == 0 and rows.data_ptr() % 16 == 0
    if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] and whole:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _dequantize_into(out: Tensor, weight: Weight, block_size: int) -> None:
    N, K = out.shape
    weight = launch.contiguous(weight)
    launch.launch(
        "codebook_dequantize", out.device, *launch.pointers(weight), N, K, block_size,
        out.data_ptr(), native.DTYPES[out.dtype],
    )  # fmt: skip


def _refuse_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> str | None:
    if weight.dim() != 2:
        return "the weight is not a matrix"
    return (
        refuse_devices(weight, codebook)
        or refuse_dtype(weight.dtype)
        or refuse_codebook(codebook, weight.shape[0], block_size)
    )


def _refuse_dequantize(packed, absmax, absmax_scale, codebook, K, block_size, dtype) -> str | None:
    weight = (packed, absmax, absmax_scale, codebook)
    return refuse_devices(packed) or refuse_dtype(dtype) or refuse_weight(weight, K, block_size)


def _refuse_linear(x, packed, absmax, absmax_scale, codebook, bias, block_size) -> str | None:
    weight = (packed, absmax, absmax_scale, codebook)
    reason = refuse_devices(x, packed, bias) or refuse_dtype(x.dtype)
    if reason is not None:
        return reason
    if x.dim() == 0:
        return "x is not [..., K]"
    if bias is not None and (bias.shape != packed.shape[:1] or bias.dtype != x.dtype):
        return "the bias is not [N] of the dtype of x"
    return refuse_weight(weight, x.shape[-1], block_size)


def _refuse_linear_dx(dy, packed, absmax, absmax_scale, codebook, K, block_size) -> str | None:
    weight = (packed, absmax, absmax_scale, codebook)
    reason = refuse_devices(dy, packed) or refuse_dtype(dy.dtype)
    if reason is not None:
        return reason
    if dy.dim() == 0 or dy.shape[-1] != packed.shape[0]:
        return "dy is not [..., N]"
    return refuse_weight(weight, K, block_size)


REFUSALS = {
    "codebook_quantize": _refuse_quantize,
    "codebook_dequantize": _refuse_dequantize,
    "codebook_linear": _refuse_linear,
    "codebook_linear_dx": _refuse_linear_dx,
}
