"""NF3 and NF2: the construction of NF4 with 8 and 4 values, stored in 3 and 2 bits a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import by_panels, pack, pack_planes, panels, unpack, unpack_planes
from .codebook import CodebookQuantizer
from .registry import register
from .storage import Storage


def normal_float(bits: int) -> tuple[float, ...]:
    """2^bits ascending values from -1 to 1 with a zero, the positive side having one more.

    Each side takes the quantiles of N(0, 1) at evenly spaced probabilities from 1/2, exclusive, to
    1 - (1/32 + 1/30) / 2, over the largest of them. At 4 bits this is NF4; with fewer, LoftQ keeps
    the same end.   QLoRA, arXiv:2305.14314, §3 and appendix E; LoftQ, arXiv:2310.08659, §4.
    """
    top = 1 - (1 / 32 + 1 / 30) / 2
    sides = [
        torch.special.ndtri(torch.linspace(0.5, top, count + 1, dtype=torch.float64, device="cpu"))
        for count in (2 ** (bits - 1) - 1, 2 ** (bits - 1))
    ]
    negative, positive = (side / side[-1] for side in sides)
    return (*(-negative[1:].flip(0)).tolist(), 0.0, *positive[1:].tolist())


class NormalFloat:
    """w[n, k] = codebook[code[n, k]] * absmax[n, k // G], with codes of `bits` bits.

    The Storage holds planes uint8 [N, bits, ceil(K / 8)], one for each bit of the codes, and
    a CodebookQuantizer's absmax, absmax_scale and codebook [1, 16], its last value repeated.
    """

    bits: int
    row_local = True

    def __init__(self, block_size: int = 64, double_quant: bool = True) -> None:
        values = normal_float(self.bits)
        padded = values + values[-1:] * (16 - len(values))  # a repeat of the last is never chosen
        self.codec = CodebookQuantizer(padded, block_size, double_quant)

    def quantize(self, weight: Tensor) -> Storage:
        """Nearest codes of weight [N, K]; a tie goes to the lower. WeightError: NaN or inf."""
        storage = self.codec.quantize(weight)
        packed, (N, K) = storage["packed"], storage.shape
        planes = torch.cat(
            [
                pack_planes(unpack(packed[start:stop], K), self.bits)
                for start, stop in panels(N, K, weight.device)
            ]
        )
        tensors = {"planes": planes, **storage.tensors}
        del tensors["packed"]
        return Storage(self.name, storage.shape, weight.dtype, tensors, storage.options)

    def dequantize(self, storage: Storage, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: one float32 product, rounded once to `dtype`."""
        return by_panels(storage, dtype, self._decode)

    def _decode(self, storage: Storage, dtype: torch.dtype) -> Tensor:
        packed = pack(unpack_planes(storage["planes"], storage.shape[1]))
        nibbles = {"packed": packed, **storage.tensors}
        return self.codec.dequantize(
            Storage(storage.scheme, storage.shape, storage.dtype, nibbles, storage.options), dtype
        )


@register("nf3")
class NF3(NormalFloat):
    """3.5 bits a weight at block size 64, about 3.13 with double quantization."""

    bits = 3


@register("nf2")
class NF2(NormalFloat):
    """2.5 bits a weight at block size 64, about 2.13 with double quantization."""

    bits = 2
