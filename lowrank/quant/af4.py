"""AF4, AbnormalFloat: the codebook of least mean error for normal weights in blocks of this size.

Yoshida, "NF4 isn't information theoretically optimal (and that's good)", arXiv:2306.06965.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from . import checks
from .codebook import FixedCodebook
from .registry import register

_POINTS = 1024  # of each numerical integral: the values are then right to five digits


@register("af4")
class AF4(FixedCodebook):
    """A table for each block size: the larger the blocks, the denser around zero."""

    def __init__(self, block_size: int = 64, double_quant: bool = True) -> None:
        self.table = abnormal_float(checks.block_size(block_size))
        super().__init__(block_size, double_quant)


@cache
def abnormal_float(block_size: int) -> tuple[float, ...]:
    """The 16 values for blocks of G = `block_size`: 7 negative, 0, 8 positive, from -1 to 1.

    Of G values of N(0, 1) the largest magnitude M has P(M < m) = (2 Φ(m) - 1)^G, and the others,
    divided by it, P(|x| < t | M) = (Φ(tM) - 1/2) / (Φ(M) - 1/2). The values on each side of zero
    are the medians of the weights nearest to them, 1 being fixed and the first bin beginning at 0.
    """
    u = (torch.arange(_POINTS, dtype=torch.float64, device="cpu") + 0.5) / _POINTS
    m = ndtri((1 + u ** (1 / block_size)) / 2)
    t = torch.linspace(0, 1, _POINTS + 1, dtype=torch.float64, device="cpu")
    below = ((ndtr(t[:, None] * m) - 0.5) / (ndtr(m) - 0.5)).mean(dim=1)  # P(|x| < t)
    negative, positive = _medians(t, below, 7), _medians(t, below, 8)
    return (*(-negative.flip(0)).tolist(), 0.0, *positive.tolist())


def _medians(t: Tensor, below: Tensor, count: int) -> Tensor:
    """`count` values up to 1, each but it the median between the middles to its neighbours."""
    values = torch.linspace(0, 1, count + 1, dtype=torch.float64, device="cpu")[1:]
    for _ in range(2000):
        edges = torch.cat((t[:1], (values[1:] + values[:-1]) / 2))
        mass = _interpolate(t, below, edges)
        medians = _interpolate(below, t, (mass[1:] + mass[:-1]) / 2)
        moved = (medians - values[:-1]).abs().max()
        values[:-1] = medians
        if moved < 1e-10:
            break
    return values


def _interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """The piecewise linear function through ascending (x, y), at these points."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    weight = (at - x[right - 1]) / (x[right] - x[right - 1])
    return torch.lerp(y[right - 1], y[right], weight)
