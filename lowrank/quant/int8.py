"""LLM.int8's weights: a row is 8-bit integers and its largest magnitude.

Dettmers et al., arXiv:2208.07339, §2.1; the numbers are bitsandbytes' bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .blocks import by_panels, panels
from .registry import register
from .storage import Storage


@register("int8")
class Int8:
    """w[n, k] = CB[n, k] * SCB[n] / 127, CB being round(half(w) * 127 / SCB).

    The weight is rounded to float16 first, as bitsandbytes does, so magnitudes from 65520 on are
    refused. The Storage holds CB int8 [N, K] and SCB float32 [N], under bitsandbytes' names.
    """

    row_local = True

    def quantize(self, weight: Tensor) -> Storage:
        """Nearest codes of weight [N, K]. WeightError: NaN, inf, or more than float16 holds."""
        source = checks.matrix(weight)
        N, K = source.shape
        CB = torch.empty(N, K, dtype=torch.int8, device=source.device)
        SCB = torch.empty(N, dtype=torch.float32, device=source.device)
        for start, stop in panels(N, K, source.device):
            half = source[start:stop].to(torch.float16)
            largest = half.abs().amax(dim=1).float()
            checks.finite(
                largest, start, "magnitudes below 65520, the limit of float16; got others"
            )
            SCB[start:stop] = largest
            factor = 127 / torch.where(largest > 0, largest, 1)
            CB[start:stop] = (half * factor[:, None]).round_()
        return Storage(self.name, (N, K), weight.dtype, {"CB": CB, "SCB": SCB})

    def dequantize(self, storage: Storage, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], formed in float32 and rounded once to `dtype`."""
        return by_panels(storage, dtype, _decode)


def _decode(storage: Storage, dtype: torch.dtype) -> Tensor:
    return (storage["CB"] * storage["SCB"][:, None]).mul_(1 / 127).to(dtype)
