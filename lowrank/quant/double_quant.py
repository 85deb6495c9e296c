"""Double quantization: scales, or offsets, of a row in 8 bits, with a float32 step and offset.

absmax[n, b] ≈ float32(code[n, b] * step[n]) + offset[n]: a multiply, then an add, each rounded.

Groups are whole rows, so that a slice of rows carries its own constants; the weight error equals
that of groups of 256 over the flat tensor.   After QLoRA, arXiv:2305.14314, §3 (which has
a signed 8-bit float table and the mean over the tensor in place of step and offset).
"""

from __future__ import annotations

import torch
from torch import Tensor


def compress(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, nb] and (step, offset) float32 [N, 2] of finite absmax [N, nb] of one sign.

    offset = min of the row, so the min, and with it every zero scale, is exact. step = (max - min)
    / c, c <= 255 being the largest whose code decodes to exactly the max; one does if the max is 0.
    No c does where the last bit of the min lies just below the last bit of an odd max: there the
    max decodes to its neighbour, 6e-8 of it away.
    """
    if absmax.is_meta:
        return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(
            absmax.shape[0], 2
        )
    offset, largest = absmax.aminmax(dim=1)  # [N]
    spread = largest - offset
    step = spread / 255
    pending = step * 255 + offset != largest
    pending &= spread + offset == largest  # the sum that every c aims at; if it misses, all do
    for top in range(254, 0, -1):
        if not pending.any():
            break
        candidate = spread / top
        step = torch.where(pending, candidate, step)
        pending &= candidate * top + offset != largest
    # step is 0 where all scales of a row are equal; any positive divisor then gives code 0
    divisor = torch.where(step > 0, step, 1)[:, None]
    codes = ((absmax - offset[:, None]) / divisor).round_().clamp_(0, 255).to(torch.uint8)
    return codes, torch.stack((step, offset), dim=1)


def expand(codes: Tensor, absmax_scale: Tensor) -> Tensor:
    """The float32 scales [N, nb] that the kernels see."""
    step, offset = absmax_scale.split(1, dim=1)
    return codes.float() * step + offset
