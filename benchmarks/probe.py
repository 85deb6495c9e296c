"""Rows whose products are known in float64, hidden among the rows of x that are multiplied."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import relative_error

CHECKED_ROWS = 64  # of x, at most, spread from the first to the last


@dataclass
class Probe:
    """Known rows for one stored weight [N, K]: x [P, K] and dy [P, N] in the layer's dtype, and
    x Wᵀ and dy W in float64.

    The weight itself is not kept: in float64 it is four times as large as in bfloat16.
    """

    x: Tensor
    dy: Tensor
    exact_y: Tensor
    exact_dx: Tensor

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype, seed: int = 0) -> Probe:
        """Rows from `seed`, the same for every layer of a comparison; `weight` is float64."""
        generator = torch.Generator().manual_seed(seed)
        N, K = weight.shape
        x = torch.randn(CHECKED_ROWS, K, generator=generator).to(weight.device, dtype)
        dy = torch.randn(CHECKED_ROWS, N, generator=generator).to(weight.device, dtype)
        return cls(x, dy, x.double() @ weight.T, dy.double() @ weight)

    def inputs(self, M: int) -> tuple[Tensor, Tensor]:
        """x [M, K] and dy [M, N]: fresh random rows, the known ones among them."""
        made = []
        for known in (self.x, self.dy):
            rows = torch.randn(M, known.shape[1], device=known.device).to(known.dtype)
            rows[places(M)] = known[: len(places(M))]
            made.append(rows)
        return made[0], made[1]

    def error(self, y: Tensor, dx: Tensor | None = None) -> float:
        """The larger relative error of the known rows; NaN if any element at all is not finite."""
        errors = [_error(y, self.exact_y)]
        if dx is not None:
            errors.append(_error(dx, self.exact_dx))
        return math.nan if any(map(math.isnan, errors)) else max(errors)


def places(M: int) -> Tensor:
    """Where the known rows are among M."""
    return torch.linspace(0, M - 1, min(M, CHECKED_ROWS)).round().long()


def _error(result: Tensor, exact: Tensor) -> float:
    if not bool(result.isfinite().all()):
        return math.nan
    where = places(result.shape[0])
    return relative_error(result[where], exact[: len(where)])
