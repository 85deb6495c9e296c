"""Random quantized weights, and what they stand for, written independently of the library."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank import quant


def random_weight(
    N: int, K: int, block_size: int = 64, double_quant: bool = False, tables: int = 1
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """packed, absmax, absmax_scale, codebook: all random, the pads too, which are not weights."""
    packed = torch.randint(0, 256, (N, (K + 31) // 32 * 16), dtype=torch.uint8)
    blocks = -(-K // block_size)
    codebook = torch.rand(tables, 16) * 2 - 1
    if double_quant:
        absmax = torch.randint(0, 256, (N, blocks), dtype=torch.uint8)
        return packed, absmax, torch.rand(N, 2) * 0.01, codebook
    return packed, torch.rand(N, blocks), None, codebook


def dense(packed, absmax, absmax_scale, codebook, K: int, block_size: int) -> Tensor:
    """float32 [N, K], one element's definition at a time: no panels, tables or views."""
    N = packed.shape[0]
    n, k = torch.arange(N)[:, None], torch.arange(K)[None, :]
    byte = packed[n, k // 2].int()
    code = torch.where(k % 2 == 0, byte // 16, byte % 16)
    if absmax_scale is not None:
        absmax = absmax.float() * absmax_scale[:, :1] + absmax_scale[:, 1:]
    return codebook[n % codebook.shape[0], code] * absmax[n, k // block_size]


def nf4(weight: Tensor, **options) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The tensors of `weight` in NF4, as the operators take them."""
    storage = quant.get("nf4", **options).quantize(weight)
    return (
        storage["packed"],
        storage["absmax"],
        storage.tensors.get("absmax_scale"),
        storage["codebook"],
    )
