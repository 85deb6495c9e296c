"""Memory for one tensor on its way through a loader, returned to the system when it is dropped."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 17  # below this the heap serves as well


def empty_bytes(n_bytes: int) -> Tensor:
    """An uninitialised uint8 [n_bytes] in pages of its own.

    A loader reads large tensors and keeps small ones made from them. From one heap, what is kept
    comes to lie in the holes of what was dropped, and the next large tensor no longer fits there:
    a 4-bit SmolLM2 then takes 250 MB more than it holds.
    """
    if n_bytes < _SMALL:
        return torch.empty(n_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, n_bytes, access=mmap.ACCESS_COPY)  # private pages cost less than shared
    return torch.from_numpy(np.frombuffer(pages, np.uint8))
