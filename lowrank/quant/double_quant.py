"""Double quantization: scales, or offsets, of a row in 8 bits, with a float32 step and offset.

absmax[n, b] ≈ float32(code[n, b] * step[n]) + offset[n]: a multiply, then an add, each rounded.

Groups are whole rows, so that a slice of rows carries its own constants; the weight error equals
that of groups of 256 over the flat tensor.   After QLoRA, arXiv:2305.14314, §3 (which has
a signed 8-bit float table and the mean over the tensor in place of step and offset).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowrank.errors import ConfigError

from . import checks
from .storage import Storage


def requantize_scales(storage: Storage) -> Storage:
    """The same codes with the float32 absmax of `storage` in 8 bits, as `double_quant=True` has it.

    For weights read from bitsandbytes, whose nested scales become float32 to be exact: 4.5 bits a
    weight at block size 64, 4.13 to 4.24 after this. The error added is that of QLoRA's double
    quantization, once more.
    """
    if checks.storage(storage).options.get("double_quant") is True:
        return storage
    absmax = storage.tensors.get("absmax")
    if "double_quant" not in storage.options or absmax is None or absmax.dim() != 2:
        raise ConfigError(
            "storage: expected absmax [N, blocks] of a scheme with the option double_quant; got "
            f"{storage.scheme!r}, {dict(storage.options)}; quantize the original weights anew"
        )
    codes, scale = compress(absmax)
    tensors = {}
    for name, tensor in storage.tensors.items():  # in the order in which the schemes have them
        tensors |= {"absmax": codes, "absmax_scale": scale} if name == "absmax" else {name: tensor}
    return replace(storage, tensors=tensors, options={**storage.options, "double_quant": True})


def compress(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, nb] and (step, offset) float32 [N, 2] of finite absmax [N, nb] of one sign.

    The least and the greatest magnitude of a row are exact, and so is every zero. With d for their
    difference, step = d / c for the largest c with which, in float32, it is so:
      the least has code 0 and is the offset, the greatest code c <= 255; or,
      where least + d falls between two floats and is rounded away from the greatest, for every c,
      the least has code 1 and the greatest code c + 1 <= 255, above an offset of least - step.
    Of negative values step and offset are negative. Where the greatest is below 2^-118 or above
    2^127, steps underflow and sums overflow: it may then be off by 128 of float32's least steps.
    """
    if absmax.is_meta:
        return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(
            absmax.shape[0], 2
        )
    sign = 1 - 2 * (absmax.amin(dim=1) < 0).to(absmax.dtype)
    magnitudes = absmax.abs()
    least, greatest = magnitudes.aminmax(dim=1)  # [N]
    spread = greatest - least
    first = (spread + least != greatest).to(spread.dtype)  # the code of the least
    step, offset = spread / 255, least
    pending = torch.ones_like(first, dtype=torch.bool)
    for count in range(255, 127, -1):
        if not pending.any():
            break
        try_step = spread / count
        try_offset = least - try_step * first
        exact = try_step * first + try_offset == least
        exact &= try_step * (first + count) + try_offset == greatest
        exact &= pending & (first + count <= 255)
        step, offset = torch.where(exact, try_step, step), torch.where(exact, try_offset, offset)
        pending &= ~exact
    # step is 0 where all scales of a row are equal; any positive divisor then gives code 0
    divisor = torch.where(step > 0, step, 1)[:, None]
    codes = ((magnitudes - offset[:, None]) / divisor).round_().clamp_(0, 255).to(torch.uint8)
    return codes, torch.stack((step * sign, offset * sign), dim=1)


def expand(codes: Tensor, absmax_scale: Tensor) -> Tensor:
    """The float32 scales [N, nb] that the kernels see."""
    step, offset = absmax_scale.split(1, dim=1)
    return codes.float() * step + offset
