"""Some rows of a weight at a time, and the precision of a product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PANEL = 1 << 20  # weights decoded at once: 4 MB of float32 stay in the last-level cache


def panels(N: int, K: int) -> Iterator[slice]:
    rows = max(1, _PANEL // K)
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))


def cast(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a dense weight in `dtype`: at once if they are, else panel by panel."""
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    for rows in panels(*weight.shape):
        yield rows, weight[rows].to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
