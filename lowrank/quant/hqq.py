"""HQQ: affine int4 whose offset makes the errors sparse, found without data.

Badri and Shaji, "Half-quadratic quantization of large machine learning models", 2023,
https://mobiusml.github.io/hqq_blog.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import TOP, Int4Affine, span
from .registry import register

_P = 0.7  # of the norm: below 1, so that few large errors cost less than many small ones
_BETA, _KAPPA, _STEPS = 10.0, 1.01, 20


@register("hqq")
class HQQ(Int4Affine):
    """Int4Affine's Storage, with the offset z = -low / scale of each block to minimise

        Σ |w - Q⁻¹(Q(w))|^p,  Q(w) = round(w / scale + z),  Q⁻¹(q) = (q - z) scale,  p = 0.7

    in units of the scale, by half-quadratic splitting: from the least weight's z and β = 10, twenty
    times

        e <- sign(d) max(|d| - |d|^(p - 1) / β, 0)  with d = w - Q⁻¹(Q(w))
        z <- mean of Q(w) - (w - e) / scale over the block,   β <- 1.01 β

    and of these z that with the least mean |d| is kept, for each block by itself.
    """

    def fit(self, blocks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        scale, low = span(blocks)
        step = torch.where(scale > 0, scale, 1)[..., None]
        w = blocks / step
        real = torch.arange(blocks.shape[2], device=blocks.device) < counts[:, None]  # not padding
        zero = -low[..., None] / step
        best, least, beta = zero, torch.full_like(zero, torch.inf), _BETA
        for _ in range(_STEPS):
            codes = (w + zero).round_().clamp_(0, TOP)
            error = (w - (codes - zero)).mul_(real)
            size = error.abs()
            cost = size.sum(-1, keepdim=True)
            best, least = torch.where(cost < least, zero, best), torch.minimum(cost, least)
            outliers = error.sign() * (size - size.pow(_P - 1) / beta).clamp_(min=0)
            zero = ((codes - w + outliers) * real).sum(-1, keepdim=True) / counts[:, None]
            beta *= _KAPPA
        # low <= 0 keeps a block of zeros exact when low is kept in 8 bits
        return scale, -(best * step).clamp(min=0)[..., 0]
