"""Tensors of many gigabytes of which only what is touched takes memory."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_NORESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python has a name for from 3.13 on


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros of this shape, contiguous, in pages that exist once they are written."""
    elements = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    pages = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def rows_apart(rows: Tensor, stride: int) -> Tensor:
    """The same rows [M, K] in sparse memory, `stride` elements from one to the next."""
    M, K = rows.shape
    room = sparse((M - 1) * stride + K, dtype=rows.dtype)
    apart = room.as_strided((M, K), (stride, 1))
    apart.copy_(rows)
    return apart
