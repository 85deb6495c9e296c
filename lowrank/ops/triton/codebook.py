"""Codes to weights and back, and the products of a quantized weight.

Few rows are multiplied straight from packed codes. For more, the weight is decoded into a reused
scratch and cuBLAS multiplies: at training sizes decoding is a small part of the product (231 / M
of it on an H200, by arithmetic), and no fused kernel comes near enough to cuBLAS to win it back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lowrank.kernels import configs, lora_configs
from lowrank.kernels.codebook_dequantize import codebook_dequantize_kernel
from lowrank.kernels.codebook_linear import codebook_linear_kernel, codebook_linear_row_kernel
from lowrank.kernels.codebook_linear_dx import codebook_linear_dx_kernel, sum_parts_kernel
from lowrank.kernels.codebook_quantize import codebook_quantize_kernel
from lowrank.ops.scratch import scratch

from .launch import DOT, as_rows, dot_dtype, dot_precision, on

_SUM_BLOCK = 1024

# The rows up to which a product is fused, by the major number of the compute capability. By
# arithmetic and not yet by measurement: `python -m benchmarks.gpu` times both sides of each.
# Triton has no tensor-core product for Turing, and none of exact float32 anywhere.
_FUSED_ROWS_16_BIT = {7: 1, 8: 64, 9: 64, 10: 64, 12: 64}
_FUSED_ROWS_FLOAT32 = {7: 1, 8: 16, 9: 16, 10: 16, 12: 16}
_MOST_FUSED_ROWS = 64


class Branch(NamedTuple):
    """What joins a product before it is rounded: `addend`, or scale h Bᵀ with h of its parts."""

    addend: Tensor | None  # float32 [M, N]
    parts: Tensor | None  # float32 [parts, M, R]
    B: Tensor | None  # [1, N, R]
    h: Tensor | None  # float32 [M, R], written if there is more than one part
    scale: float

    def arguments(self, dtype: torch.dtype) -> dict:
        """As codebook_linear_kernel and codebook_linear_row_kernel take it beside x of `dtype`."""
        if self.parts is None:
            return {"addend_ptr": self.addend}
        return {
            "parts_ptr": self.parts,
            "b_ptr": self.B,
            "h_ptr": self.h,
            "scale": self.scale,
            "PARTS": len(self.parts),
        } | lora_configs.ranks(self.parts.shape[2], dtype == torch.float32)


def codebook_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 absmax of weight [N, K]; only its rows need to be contiguous."""
    N, K = weight.shape
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    sorted_entries, order = codebook.sort(dim=-1, stable=True)
    mids = ((sorted_entries[:, :-1] + sorted_entries[:, 1:]) / 2).contiguous()
    packed = torch.empty(N, (K + 31) // 32 * 16, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(N, triton.cdiv(K, block_size), dtype=torch.float32, device=weight.device)
    config = configs.quantize(K, block_size)
    with on(weight.device):
        codebook_quantize_kernel[(N, triton.cdiv(absmax.shape[1], config["SPANS"]))](
            weight, mids, order.int(), packed, absmax,
            K, weight.stride(0), packed.shape[1], absmax.shape[1],
            PER_ROW=codebook.shape[0] > 1, **config,
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
    dequantize_into(out, packed, absmax, absmax_scale, codebook, block_size)
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
    rows = x.numel() // max(1, x.shape[-1])
    fused = x.numel() and packed.shape[0] and rows <= fused_rows(x.device, x.dtype)
    product = linear_from_codes if fused else linear_through_scratch
    return product(x, packed, absmax, absmax_scale, codebook, bias, block_size)


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
    rows = dy.numel() // max(1, dy.shape[-1])
    fused = dy.numel() and K and rows <= fused_rows(dy.device, dy.dtype)
    product = dx_from_codes if fused else dx_through_scratch
    return product(dy, packed, absmax, absmax_scale, codebook, K, block_size)


def fused_rows(device: torch.device, dtype: torch.dtype) -> int:
    """The most rows that `codebook_linear` and `codebook_linear_dx` multiply from packed codes."""
    if dtype not in DOT:
        return 0
    if device.type != "cuda":
        return _MOST_FUSED_ROWS
    major = torch.cuda.get_device_capability(device)[0]
    table = _FUSED_ROWS_FLOAT32 if dtype == torch.float32 else _FUSED_ROWS_16_BIT
    return table.get(major, _MOST_FUSED_ROWS)


def linear_from_codes(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
    branch: Branch | None = None,
) -> Tensor:
    """`codebook_linear` for any number of rows, at least one, without a dense weight."""
    N, K = packed.shape[0], x.shape[-1]
    rows = as_rows(x)
    M = rows.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    weight = contiguous_weight(packed, absmax, absmax_scale, codebook)
    bias = None if bias is None else bias.contiguous()
    per_row = codebook.shape[0] > 1
    joining = {} if branch is None else branch.arguments(x.dtype)
    with on(x.device):
        if M == 1:
            config = configs.linear_row(K, block_size) | joining
            codebook_linear_row_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
                rows, *weight, bias, y,
                N, packed.shape[1], absmax.shape[1], K=K, PER_ROW=per_row, **config,
            )  # fmt: skip
        else:
            config = configs.linear(M, K, block_size, x.dtype == torch.float32) | joining
            grid = (triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(M, config["BLOCK_M"]))
            codebook_linear_kernel[grid](
                rows, *weight, bias, y,
                M, N, rows.stride(0), packed.shape[1], absmax.shape[1],
                K=K, PER_ROW=per_row, DOT=dot_dtype(x.dtype),
                PRECISION=dot_precision(x.dtype), **config,
            )  # fmt: skip
    return y.view(*x.shape[:-1], N)


def linear_through_scratch(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """`codebook_linear` by cuBLAS over W decoded to the dtype of x."""
    with scratch((packed.shape[0], x.shape[-1]), x.dtype, x.device) as w:
        dequantize_into(w, packed, absmax, absmax_scale, codebook, block_size)
        return F.linear(x, w, bias)


def dx_from_codes(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
) -> Tensor:
    """`codebook_linear_dx` for any number of rows, at least one, without a dense weight.

    The sum over N is shared by several programs for each tile; their parts, float32, are added in
    order by a second kernel.
    """
    rows, parts = as_rows(dy), configs.dx_parts(packed.shape[0])
    sums = torch.empty(parts, len(rows), K, dtype=torch.float32, device=dy.device)
    dx = dx_parts_into(sums, rows, packed, absmax, absmax_scale, codebook, block_size)
    return dx.view(*dy.shape[:-1], K)


def dx_parts_into(
    sums: Tensor,
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    block_size: int,
) -> Tensor:
    """dx [M, K] for dy [M, N]: the last `configs.dx_parts(N)` of `sums` are written with the parts
    of dy W, and then all of them are added; what comes before them is the caller's.
    """
    (M, N), K = dy.shape, sums.shape[2]
    parts = configs.dx_parts(N)
    dx = torch.empty(M, K, dtype=dy.dtype, device=dy.device)
    config = configs.linear_dx(M, block_size, dy.dtype == torch.float32)
    grid = (triton.cdiv(K, config["SPAN"]), triton.cdiv(M, config["BLOCK_M"]), parts)
    part = triton.cdiv(triton.cdiv(N, parts), config["BLOCK_N"]) * config["BLOCK_N"]
    alone = len(sums) == 1
    with on(dy.device):
        codebook_linear_dx_kernel[grid](
            dy, *contiguous_weight(packed, absmax, absmax_scale, codebook),
            dx if alone else sums[len(sums) - parts :],
            M, N, K, dy.stride(0), packed.shape[1], absmax.shape[1],
            PART=part, PER_ROW=codebook.shape[0] > 1, DOT=dot_dtype(dy.dtype), **config,
        )  # fmt: skip
        if not alone:
            sum_parts_kernel[(triton.cdiv(M * K, _SUM_BLOCK),)](
                sums, dx, M * K, PARTS=len(sums), BLOCK=_SUM_BLOCK
            )
    return dx


def dx_through_scratch(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
) -> Tensor:
    """`codebook_linear_dx` by cuBLAS over W decoded to the dtype of dy."""
    with scratch((packed.shape[0], K), dy.dtype, dy.device) as w:
        dequantize_into(w, packed, absmax, absmax_scale, codebook, block_size)
        return dy @ w


def dequantize_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    block_size: int,
) -> None:
    N, K = out.shape
    if out.numel() == 0:
        return
    config = configs.dequantize(K, block_size)
    with on(packed.device):
        codebook_dequantize_kernel[(N, triton.cdiv(K, config["SPANS"] * config["SPAN"]))](
            *contiguous_weight(packed, absmax, absmax_scale, codebook), out,
            K, packed.shape[1], absmax.shape[1], 16 if codebook.shape[0] > 1 else 0, **config,
        )  # fmt: skip


def contiguous_weight(
    packed: Tensor, absmax: Tensor, absmax_scale: Tensor | None, codebook: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The tensors of a weight as the kernels address them."""
    scale = None if absmax_scale is None else absmax_scale.contiguous()
    return packed.contiguous(), absmax.contiguous(), scale, codebook.contiguous()
