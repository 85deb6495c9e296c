"""Lion over a moment of 8 bits."""

from __future__ import annotations

from torch import Tensor

from lowrank.ops.adamw8bit import dynamic_map, rows_and_columns
from lowrank.ops.lion8bit import Coefficients, coefficients

from .moments import decode, encode, in_blocks, rows_of
from .panels import panels


def lion8bit_step(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    m_scale: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """A step of Lion in place, its moment kept as 8-bit codes of 256 elements a scale.

    c = b1 m + (1 - b1) g;  m = b2 m + (1 - b2) g;  p = (1 - lr wd) p - lr sign(c)
    in float32, in the order of `lion8bit.Coefficients`; sign(c) is 0 if c is, and NaN if c is not
    finite: what a NaN did to p then shows.
    arXiv:2302.06675, algorithm 2; arXiv:2110.02861.
    """
    by = coefficients(lr, beta1, beta2, weight_decay)
    for tensors in zip(params, grads, m, m_scale, strict=True):
        N, C = rows_and_columns(tensors[0].shape)
        if N == 0 or C == 0:
            continue
        for rows in panels(N, C):
            _lion8bit_rows(by, C, *(rows_of(tensor)[rows] for tensor in tensors))


def _lion8bit_rows(
    by: Coefficients, C: int, p: Tensor, grad: Tensor, codes: Tensor, scale: Tensor
) -> None:
    """lion8bit_step of some rows: of p, grad and codes [rows, ...], of scale [rows, blocks]."""
    g = in_blocks(grad.reshape(-1, C).float())
    m = decode(codes.reshape(-1, C), scale, dynamic_map(True).to(p.device))  # [rows, blocks, 256]
    c = m * by.beta1 + g * by.rest1
    way = (c.sign() + c * 0).flatten(1)[:, :C]
    p.copy_((p.reshape(-1, C).float() * by.decay - way * by.rate).view(p.shape))
    new_codes, new_scale = encode(m * by.beta2 + g * by.rest2, signed=True)
    codes.copy_(new_codes.flatten(1)[:, :C].reshape(codes.shape))
    scale.copy_(new_scale)
