"""Memory for one tensor on its way through a loader, returned to the system when it is dropped."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Empty = Callable[[int], Tensor]  # n -> an uninitialised uint8 [n]
_SMALL = 1 << 17  # bytes; below this the heap serves as well


def empty_bytes(n_bytes: int) -> Tensor:
    """An uninitialised uint8 [n_bytes] in pages of its own.

    A loader reads large tensors and keeps small ones made from them. From one heap, what is kept
    comes to lie in the holes of what was dropped, and the next large tensor no longer fits there:
    a 4-bit SmolLM2 then takes 250 MB more than it holds.
    """
    if n_bytes < _SMALL:
        return torch.empty(n_bytes, dtype=torch.uint8)
    return torch.from_numpy(np.frombuffer(_pages(n_bytes), np.uint8))


class Reused:
    """Pages that serve again when the tensor in them is dropped, for tensors that all will be.

    To fault fresh pages in takes twice as long as to copy a cached file into pages that are there.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def empty(self, n_bytes: int) -> Tensor:
        """An uninitialised uint8 [n_bytes]."""
        if n_bytes < _SMALL:
            return empty_bytes(n_bytes)
        pages = next((free for free in self._free if len(free) >= n_bytes), None)
        if pages is None:
            self._free.clear()  # larger ones take the place of what is too small
            pages = _pages(n_bytes)
        else:
            self._free.remove(pages)
        array = np.frombuffer(pages, np.uint8, n_bytes)
        weakref.finalize(array, self._free.append, pages)
        return torch.from_numpy(array)


def _pages(n_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, n_bytes, access=mmap.ACCESS_COPY)  # private pages cost less than shared
