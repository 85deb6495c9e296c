"""AdamW over moments of 8 bits."""

from __future__ import annotations

from torch import Tensor

from lowrank.ops.adamw8bit import Coefficients, coefficients, dynamic_map, rows_and_columns

from .moments import decode, encode, in_blocks, rows_of
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
    Codes are those of `moments.encode`: in v, 0 for something small would make m / (sqrt(v) + eps)
    large.
    arXiv:1711.05101, arXiv:2110.02861; on zero in v, arXiv:2309.01507, §3.
    """
    by = coefficients(lr, beta1, beta2, eps, weight_decay, step)
    for tensors in zip(params, grads, m, m_scale, v, v_scale, strict=True):
        N, C = rows_and_columns(tensors[0].shape)
        if N == 0 or C == 0:
            continue
        for rows in panels(N, C):
            _adamw8bit_rows(by, C, *(rows_of(tensor)[rows] for tensor in tensors))


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
    m = decode(m_codes.reshape(-1, C), m_scale, m_map) * by.beta1 + in_blocks(g * by.rest1)
    v = decode(v_codes.reshape(-1, C), v_scale, v_map) * by.beta2 + in_blocks(g * g * by.rest2)
    ratio = (m / (v.sqrt() * by.root2 + by.eps)).flatten(1)[:, :C]
    p.copy_((p.reshape(-1, C).float() * by.decay - ratio * by.rate).view(p.shape))
    for values, signed, codes, scale in ((m, True, m_codes, m_scale), (v, False, v_codes, v_scale)):
        new_codes, new_scale = encode(values, signed)
        codes.copy_(new_codes.flatten(1)[:, :C].reshape(codes.shape))
        scale.copy_(new_scale)
