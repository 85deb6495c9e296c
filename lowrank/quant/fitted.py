"""A codebook fitted to the weights it is for: Lloyd's algorithm on what the block scales leave.

Lloyd, "Least squares quantization in PCM", 1982; Max, "Quantizing for minimum distortion", 1960.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lowrank.errors import ConfigError

from . import checks
from .blocks import join, panels, split
from .codebook import CodebookQuantizer
from .codebooks import NF4
from .registry import register
from .storage import Storage

_STEPS = 50
_SAMPLE = 1 << 21  # weights from which one table is fitted
_VALUE, _WEIGHT = 1 << 22, 1 << 16  # units of the integer sums: no order of addition changes them


@register("fitted")
class Fitted(CodebookQuantizer):
    """16 values of least Σ absmax² (s - value)², that is of least squared error of the weights.

    s are the weights over the absmax of their blocks. From NF4's values, and from quantiles of the
    weights, until nothing moves: each value becomes the mean, weighted by absmax², of the s nearest
    to it. The error never grows, so it ends at NF4's or below.
    `per` = "tensor" fits one table to all rows, or to evenly spaced ones of a large weight; "row"
    fits one to each, 512 / K bits a weight more.
    """

    def __init__(
        self,
        per: Literal["tensor", "row"] = "tensor",
        block_size: int = 64,
        double_quant: bool = True,
    ) -> None:
        if per not in ("tensor", "row"):
            raise ConfigError(f"per: expected 'tensor' or 'row'; got {per!r}")
        super().__init__(NF4, block_size, double_quant)
        self.per = per

    @classmethod
    def from_storage(cls, storage: Storage) -> Fitted:
        return cls(**storage.options)

    @property
    def row_local(self) -> bool:
        return self.per == "row"

    @property
    def options(self) -> dict[str, int | float | bool | str]:
        return {"per": self.per, **super().options}

    def table_for(self, weight: Tensor) -> Tensor:
        N, K = weight.shape
        if weight.is_meta:
            return weight.new_empty(N if self.per == "row" else 1, 16, dtype=torch.float32)
        if self.per == "tensor":
            every = -(-N // max(1, _SAMPLE // K))
            return self._fit(weight[::every]).to(weight.device)
        parts = [
            self._fit(weight[start:stop], start) for start, stop in panels(N, K, weight.device)
        ]
        return torch.cat(parts)

    def _fit(self, rows: Tensor, first: int = 0) -> Tensor:
        """The tables [1, 16] or [n, 16] of these rows [n, K]."""
        K = rows.shape[1]
        blocks = split(rows, self.block_size)
        absmax = blocks.abs().amax(dim=-1, keepdim=True)
        checks.finite(absmax, first)
        scaled = join(blocks / torch.where(absmax > 0, absmax, 1), K)
        largest = absmax.amax(dim=1, keepdim=True)
        if self.per == "tensor":
            largest = largest.amax(dim=0, keepdim=True)
        relative = absmax / torch.where(largest > 0, largest, 1)
        weights = join(relative.square().expand_as(blocks), K)
        if self.per == "tensor":
            scaled, weights = scaled.reshape(1, -1), weights.reshape(1, -1)
        return lloyd(scaled, weights, self.codebook.to(rows.device))


def lloyd(values: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Ascending tables [n, 16] of least Σ w (v - table[nearest])², locally, one for each row.

    values in [-1, 1] and weights in [0, 1] are float32 [n, m]; start [1, 16] ascends. Of this start
    and the quantiles of a row, what ends with less is taken. The sums are of integers, 22 and 16
    bits a factor, so that every device finds the same means.
    """
    values, order = values.sort(dim=1)
    weights = weights.gather(1, order).mul_(_WEIGHT).round_().long()
    moments = (values * _VALUE).round_().long() * weights
    # sums over the first i values, for i = 0 to m
    mass, moment = (torch.nn.functional.pad(t.cumsum(dim=1), (1, 0)) for t in (weights, moments))
    shares = torch.arange(1, 32, 2, device=values.device)  # of 32
    quantiles = torch.searchsorted(mass, mass[:, -1:] * shares // 32)
    starts = start.expand(values.shape[0], 16), values.gather(1, (quantiles - 1).clamp(min=0))
    (a, gain_a), (b, gain_b) = (_descend(values, mass, moment, t.contiguous()) for t in starts)
    return torch.where(gain_b > gain_a, b, a)


def _descend(values: Tensor, mass: Tensor, moment: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The tables [n, 16] that the iteration ends with, and Σ w v² less their error [n, 1]."""
    for _ in range(_STEPS):
        count, mean = _cells(values, mass, moment, table)
        moved = torch.where(count > 0, mean, table)
        if torch.equal(moved, table):
            break
        table = moved
    count, mean = _cells(values, mass, moment, table)
    table = table.double()
    return table.float(), (count * table * (2 * mean - table)).sum(dim=1, keepdim=True)


def _cells(values: Tensor, mass: Tensor, moment: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of what is nearest to each entry of the table, and its mean: [n, 16]."""
    edges = torch.searchsorted(values, (table[:, :-1] + table[:, 1:]) / 2, right=True)
    edges = torch.nn.functional.pad(edges, (1, 0))  # a tie went to the lower value
    edges = torch.nn.functional.pad(edges, (0, 1), value=values.shape[1])
    count, total = (t.gather(1, edges).diff(dim=1) for t in (mass, moment))
    return count, (total.double() / count.clamp(min=1) / _VALUE).float()
