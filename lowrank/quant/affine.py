"""Affine int4: 16 equidistant values from the least to the largest weight of a block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import checks
from . import double_quant as scales
from .blocks import by_panels, join, pack, panels, split, unpack
from .blockwise import Blockwise
from .registry import register
from .storage import Storage

TOP = 15  # the largest code


@register("int4_affine")
class Int4Affine(Blockwise):
    """w[n, k] = code[n, k] * scale[n, k // G] + low[n, k // G]: a product, then a sum, in float32.

    low = min(w, 0) and scale = (max(w, 0) - low) / 15 over a block of G = `block_size` weights of a
    row. A range with zero in it makes low <= 0, so that with `double_quant`, which keeps scale and
    low in 8 bits, a block of zeros is still exact.

    The Storage holds packed uint8 [N, ceil(K / 32) * 16] (even element in the high nibble), scale
    and low float32 [N, ceil(K / G)], or uint8 with scale_scale and low_scale float32 [N, 2].
    """

    row_local = True

    def quantize(self, weight: Tensor) -> Storage:
        """Nearest codes of weight [N, K]. WeightError: NaN or inf."""
        source = checks.matrix(weight)
        N, K = source.shape
        width = -(-K // self.block_size) * min(self.block_size, K)
        parts = [
            self._encode(source[start:stop], start)
            for start, stop in panels(N, width, source.device)
        ]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Storage(self.name, (N, K), weight.dtype, tensors, self.options)

    def dequantize(self, storage: Storage, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], formed in float32 and rounded once to `dtype`."""
        return by_panels(storage, dtype, _decode)

    def fit(self, blocks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, low) float32 [n, nb] for blocks [n, nb, G], counts [nb] of them not padding."""
        return span(blocks)

    def _encode(self, rows: Tensor, first: int) -> dict[str, Tensor]:
        K, G = rows.shape[1], self.block_size
        blocks = split(rows, G)
        counts = torch.full(blocks.shape[1:2], blocks.shape[2], device=rows.device)
        counts[-1] -= -K % blocks.shape[2]
        scale, low = self.fit(blocks, counts)
        checks.finite(TOP * scale + low, first, "finite values, less than 3.4e38 apart; got others")
        tensors = {"scale": scale, "low": low}
        if self.double_quant:
            for name, values in (("scale", scale), ("low", low)):
                tensors[name], tensors[f"{name}_scale"] = scales.compress(values)
            scale, low = _expanded(tensors)
        codes = nearest(blocks, scale, low).to(torch.uint8)
        return {"packed": pack(join(codes, K)), **tensors}


def span(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, low) [n, nb] with which 16 values reach from min(w, 0) to max(w, 0) of each block."""
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    return high / TOP - low / TOP, low  # the difference alone may exceed float32


def nearest(blocks: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The codes 0 to 15 nearest to blocks [n, nb, G], as float32; 0 where the scale is 0."""
    divisor = torch.where(scale > 0, scale, 1)[..., None]
    return (blocks / divisor - low[..., None] / divisor).round_().clamp_(0, TOP)


def _decode(storage: Storage, dtype: torch.dtype) -> Tensor:
    K = storage.shape[1]
    scale, low = _expanded(storage.tensors)
    blocks = split(unpack(storage["packed"], K), storage.options["block_size"])
    return join(blocks.mul_(scale[..., None]).add_(low[..., None]), K).to(dtype)


def _expanded(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    scale, low = tensors["scale"], tensors["low"]
    if "scale_scale" in tensors:
        scale = scales.expand(scale, tensors["scale_scale"])
        low = scales.expand(low, tensors["low_scale"])
    return scale, low
