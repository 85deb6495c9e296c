"""Codes to weights and back, and the products of a quantized weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .panels import compute_dtype, panels


def codebook_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Nearest codes of weight [N, K], each block of G along a row scaled by its largest magnitude.

    absmax[n, b] = max |w[n, k]| over k // G == b; s = w / absmax; code = the number of midpoints
    between neighbours of the sorted codebook that are < s, so a tie goes to the lower neighbour.
    A full block multiplies by the reciprocal and a short last one divides, as bitsandbytes does.
    Returns packed, absmax (float32); NaN and inf show in absmax.   QLoRA, arXiv:2305.14314, §3.
    """
    N, K = weight.shape
    full = K // block_size * block_size  # where the last, short block begins
    entries, order = codebook.sort(dim=-1, stable=True)  # [T, 16]
    is_sorted = torch.equal(entries, codebook)
    mids = (entries[:, :-1] + entries[:, 1:]) / 2  # [T, 15]
    packed = torch.zeros(N, (K + 31) // 32 * 16, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(N, -(-K // block_size), dtype=torch.float32, device=weight.device)
    for rows in panels(N, K):
        scaled = weight[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        largest = absmax[rows]
        if full:
            blocks = scaled[:, :full].unflatten(1, (-1, block_size))
            largest[:, : full // block_size] = blocks.abs().amax(-1)
            blocks.mul_(largest[:, : full // block_size, None].clamp(min=1e-38).reciprocal())
        if full < K:
            largest[:, -1] = scaled[:, full:].abs().amax(-1)
            scaled[:, full:].div_(largest[:, -1:].clamp(min=1e-38))
        scaled.clamp_(-1, 1)
        table = rows if codebook.shape[0] == N else slice(0, 1)
        codes = torch.zeros(scaled.shape, dtype=torch.uint8, device=weight.device)
        for mid in mids[table].split(1, dim=1):  # [rows or 1, 1]; twice as fast as bucketize
            codes += scaled > mid
        if not is_sorted:
            codes = order[table].expand(len(codes), 16).gather(1, codes.long()).to(torch.uint8)
        packed[rows, : (K + 1) // 2] = codes[:, 0::2] << 4
        packed[rows, : K // 2] |= codes[:, 1::2]
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
    """w[n, k] = codebook[t, code[n, k]] * absmax[n, k // G]  [N, K], rounded once to `dtype`."""
    out = torch.empty(packed.shape[0], K, dtype=dtype, device=packed.device)
    for rows, w in decode(packed, absmax, absmax_scale, codebook, K, block_size):
        out[rows] = w
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
    K, N = x.shape[-1], packed.shape[0]
    rows_of_x = x.reshape(-1, K).to(compute_dtype(x))  # [M, K]
    y = rows_of_x.new_empty(rows_of_x.shape[0], N)
    for rows, w in decode(packed, absmax, absmax_scale, codebook, K, block_size):
        torch.mm(rows_of_x, w.to(y.dtype).T, out=y[:, rows])
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], N)


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
    rows_of_dy = dy.reshape(-1, packed.shape[0]).to(compute_dtype(dy))  # [M, N]
    dx = rows_of_dy.new_zeros(rows_of_dy.shape[0], K)
    for rows, w in decode(packed, absmax, absmax_scale, codebook, K, block_size):
        dx.addmm_(rows_of_dy[:, rows], w.to(dx.dtype))
    return dx.to(dy.dtype).view(*dy.shape[:-1], K)


def decode(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Panels of rows of the weight in float32, each [rows, K]."""
    pairs = _pair_table(codebook[0]) if codebook.shape[0] == 1 else None
    full = K // block_size
    for rows in panels(packed.shape[0], K):
        codes, scales = packed[rows], absmax[rows]
        if absmax_scale is not None:
            step, offset = absmax_scale[rows].split(1, dim=1)  # [rows, 1]
            scales = scales.float() * step + offset  # two roundings: not an fma
        if pairs is not None:
            values = (
                pairs.index_select(0, codes.reshape(-1).int()).view(codes.shape).view(torch.float32)
            )
        else:
            nibbles = torch.stack((codes >> 4, codes & 0xF), dim=-1).flatten(1)
            values = codebook[rows].gather(1, nibbles.long())
        values = values[:, :K]  # the pad of a row is never read as weights
        values[:, : full * block_size].unflatten(1, (full, block_size)).mul_(scales[:, :full, None])
        values[:, full * block_size :].mul_(scales[:, full:])
        yield rows, values


def _pair_table(entries: Tensor) -> Tensor:
    """The two floats that each byte stands for, as one int64: [256].

    One 8-byte lookup a byte is 17 times faster in torch than indexing by nibble (on one core).
    """
    pairs = torch.stack((entries.repeat_interleave(16), entries.repeat(16)), dim=-1)  # [256, 2]
    return pairs.view(torch.int64)[:, 0].contiguous()
