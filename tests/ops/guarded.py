"""Tensors that end where the process may not read: one byte too far is its end."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_NOTHING = 0  # PROT_NONE


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy whose last byte is the last before a page that nobody may touch.

    Where it begins follows from its size: hardly ever on a multiple of more than its elements.
    """
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, whole + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    if _libc.mprotect(start + whole, mmap.PAGESIZE, _NOTHING):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    return copy.view(tensor.shape).copy_(tensor)


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """Such a tensor full of NaN, or of the largest integer, to be written."""
    value = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    return guarded(torch.full(shape, value, dtype=dtype))
