"""What the kernels cannot take, in a few words each."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.ops import native

from .panels import Weight


def refuse_weight(weight: Weight, K: int, block_size: int, *others: Tensor) -> str | None:
    """Of a weight [N, K], and of tensors that only have to be on the CPU."""
    packed, absmax, scale, codebook = weight
    if packed.dim() != 2 or K < 1:
        return "the weight is not [N, K] with K >= 1"
    N = packed.shape[0]
    reason = refuse_codebook(codebook, N, block_size)
    if reason is not None:
        return reason
    if packed.dtype != torch.uint8 or packed.shape[1] != (K + 31) // 32 * 16:
        return f"packed is not uint8 [N, {(K + 31) // 32 * 16}]"
    expected = torch.float32 if scale is None else torch.uint8
    if absmax.dtype != expected or absmax.shape != (N, (K + block_size - 1) // block_size):
        return f"absmax is not {expected} [N, ceil(K / block_size)]"
    if not (packed.is_contiguous() and absmax.is_contiguous()):
        return "packed or absmax is not contiguous"
    if scale is None:
        return refuse_devices(packed, absmax, codebook, *others)
    if scale.dtype != torch.float32 or scale.shape != (N, 2) or not scale.is_contiguous():
        return "absmax_scale is not contiguous float32 [N, 2]"
    return refuse_devices(packed, absmax, codebook, scale, *others)


def refuse_codebook(codebook: Tensor, N: int, block_size: int) -> str | None:
    if codebook.dtype != torch.float32 or codebook.shape not in ((1, 16), (N, 16)):
        return "the codebook is not float32 [1, 16] or [N, 16]"
    if not codebook.is_contiguous():
        return "the codebook is not contiguous"
    if not 32 <= block_size <= 4096 or block_size & (block_size - 1):
        return f"block size {block_size} is not a power of two from 32 to 4096"
    return None


def refuse_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in native.DTYPES else f"{dtype} is not float32, float16 or bfloat16"


def refuse_devices(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if not tensor.is_cpu:
            return "not all tensors are on the CPU"
        if tensor.data_ptr() % tensor.itemsize:
            return "a tensor is not aligned to its elements"
    return None
