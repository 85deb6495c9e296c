"""Moments as codes of 8 bits: table[code] * scale, one scale for each 256 elements of a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.ops.adamw8bit import BLOCK, ZERO_OF_M, dynamic_map


def rows_of(tensor: Tensor) -> Tensor:
    """A view of it whose first dimension is the rows of `adamw8bit.rows_and_columns`."""
    return tensor if tensor.dim() > 1 else tensor[None]


def in_blocks(rows: Tensor) -> Tensor:
    """[rows, C] -> [rows, blocks, 256], the last block filled up with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def decode(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """codes uint8 [rows, C], scale [rows, blocks] -> float32 [rows, blocks, 256]."""
    return in_blocks(table[codes.int()]) * scale[..., None]


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 [rows, blocks, 256] -> codes of that shape, int64, and scale [rows, blocks].

    The nearest code, of two the one nearer zero. -1 is not in the signed map: its scale is such
    that the map's least value still is a largest value below 0. In the other, only 0 is coded as 0.
    """
    table = dynamic_map(signed).to(values.device)
    if signed:
        s, scale = _scaled(values, torch.maximum(values, values * table[0].reciprocal()).amax(-1))
        distance = _nearest(table[ZERO_OF_M:], s.abs())
        codes = (ZERO_OF_M + torch.where(s.signbit(), -distance, distance)).clamp(min=0)
    else:
        s, scale = _scaled(values, values.amax(-1))
        codes = torch.where(s == 0, 0, 1 + _nearest(table[1:], s))
    return codes, scale


def _scaled(values: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """values / scale and the scale, which is 0 where its reciprocal would be infinite."""
    scale = largest.masked_fill(largest < torch.finfo(torch.float32).tiny, 0)
    inverse = torch.where(scale == 0, 0, scale.reciprocal())
    return values * inverse[..., None], scale


def _nearest(entries: Tensor, s: Tensor) -> Tensor:
    """Index of the entry nearest to s, the lower of two: how many exact midpoints are below s."""
    entries = entries.double()
    return torch.bucketize(s.double(), (entries[:-1] + entries[1:]) / 2)
