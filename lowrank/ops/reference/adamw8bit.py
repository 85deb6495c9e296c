"""AdamW over moments of 8 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.ops.adamw8bit import (
    BLOCK,
    ZERO_OF_M,
    Coefficients,
    coefficients,
    dynamic_map,
    rows_and_columns,
)

from .panels import panels


def adamw8bit_step(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    m_scale: list[Tensor],
    v: list[Tensor],
    v_scale: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Step number `step` of AdamW in place, moments kept as 8-bit codes of 256 elements a scale.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    in float32, in the order of `adamw8bit.Coefficients`; p moves by m and v before they are coded.
    Codes are the nearest, a tie goes to the one nearer zero, and only 0 is coded as 0 in v: there,
    0 for something small would make m / (sqrt(v) + eps) large.
    arXiv:1711.05101, arXiv:2110.02861; on zero in v, arXiv:2309.01507, §3.
    """
    by = coefficients(lr, beta1, beta2, eps, weight_decay, step)
    for tensors in zip(params, grads, m, m_scale, v, v_scale, strict=True):
        N, C = rows_and_columns(tensors[0].shape)
        if N == 0 or C == 0:
            continue
        for rows in panels(N, C):
            _adamw8bit_rows(by, C, *(_rows_of(tensor)[rows] for tensor in tensors))


def _rows_of(tensor: Tensor) -> Tensor:
    """A view of it whose first dimension is the rows of `adamw8bit.rows_and_columns`."""
    return tensor if tensor.dim() > 1 else tensor[None]


def _adamw8bit_rows(
    by: Coefficients,
    C: int,
    p: Tensor,
    grad: Tensor,
    m_codes: Tensor,
    m_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
) -> None:
    """adamw8bit_step of some rows: of p, grad and codes [rows, ...], of scales [rows, blocks]."""
    m_map, v_map = dynamic_map(True).to(p.device), dynamic_map(False).to(p.device)
    g = grad.reshape(-1, C).float()
    m = _in_blocks(m_map[m_codes.reshape(-1, C).int()]) * m_scale[..., None]
    v = _in_blocks(v_map[v_codes.reshape(-1, C).int()]) * v_scale[..., None]
    m = m * by.beta1 + _in_blocks(g * by.rest1)  # [rows, blocks, 256]
    v = v * by.beta2 + _in_blocks(g * g * by.rest2)
    ratio = (m / (v.sqrt() * by.root2 + by.eps)).flatten(1)[:, :C]
    p.copy_((p.reshape(-1, C).float() * by.decay - ratio * by.rate).view(p.shape))

    # -1 is not in the map of m; the scale is such that its least value still is a largest m < 0.
    largest = torch.maximum(m, m * m_map[0].reciprocal()).amax(-1)  # [rows, blocks]
    s, scale = _scaled(m, largest)
    distance = _nearest(m_map[ZERO_OF_M:], s.abs())
    codes = (ZERO_OF_M + torch.where(s.signbit(), -distance, distance)).clamp(min=0)
    m_codes.copy_(codes.flatten(1)[:, :C].reshape(m_codes.shape))
    m_scale.copy_(scale)

    s, scale = _scaled(v, v.amax(-1))
    codes = torch.where(s == 0, 0, 1 + _nearest(v_map[1:], s))
    v_codes.copy_(codes.flatten(1)[:, :C].reshape(v_codes.shape))
    v_scale.copy_(scale)


def _in_blocks(rows: Tensor) -> Tensor:
    """[rows, C] -> [rows, blocks, 256], the last block filled up with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _scaled(values: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """values / scale and the scale, which is 0 where its reciprocal would be infinite."""
    scale = largest.masked_fill(largest < torch.finfo(torch.float32).tiny, 0)
    inverse = torch.where(scale == 0, 0, scale.reciprocal())
    return values * inverse[..., None], scale


def _nearest(entries: Tensor, s: Tensor) -> Tensor:
    """Index of the entry nearest to s, the lower of two: how many exact midpoints are below s."""
    entries = entries.double()
    return torch.bucketize(s.double(), (entries[:-1] + entries[1:]) / 2)
