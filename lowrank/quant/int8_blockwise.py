"""8 bits a weight in a dynamic map: seven decades, relative steps finer the larger the value.

Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv:2110.02861, §2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.ops.adamw8bit import dynamic_map

from . import checks
from . import double_quant as scales
from .blocks import by_panels, join, panels, split
from .blockwise import Blockwise
from .registry import register
from .storage import Storage


@register("int8_blockwise")
class Int8Blockwise(Blockwise):
    """w[n, k] = codebook[code[n, k]] * absmax[n, k // G], the 256 values being a dynamic map.

    The code is that of the nearest value, a tie going to the lower. -1 is not among the values, so
    a block whose extreme is negative is up to 0.7 % short there.

    The Storage holds codes uint8 [N, K], absmax float32 [N, ceil(K / G)] or uint8 with absmax_scale
    float32 [N, 2], and codebook float32 [1, 256].
    """

    row_local = True

    def __init__(self, block_size: int = 256, double_quant: bool = False) -> None:
        super().__init__(block_size, double_quant)

    def quantize(self, weight: Tensor) -> Storage:
        """Nearest codes of weight [N, K]. WeightError: NaN or inf."""
        source = checks.matrix(weight)
        (N, K), G, device = source.shape, self.block_size, source.device
        codebook = dynamic_map(signed=True).to(device, copy=True)
        middles = (codebook[:-1] + codebook[1:]) / 2
        codes = torch.empty(N, K, dtype=torch.uint8, device=device)
        absmax = torch.empty(N, -(-K // G), dtype=torch.float32, device=device)
        for start, stop in panels(N, K, device):
            blocks = split(source[start:stop], G)
            largest = blocks.abs().amax(dim=-1)
            checks.finite(largest, start)
            absmax[start:stop] = largest
            scaled = blocks / torch.where(largest > 0, largest, 1)[..., None]
            nearest = torch.bucketize(scaled, middles, out_int32=True)
            codes[start:stop] = join(nearest, K)
        tensors = {"codes": codes, "absmax": absmax}
        if self.double_quant:
            tensors["absmax"], tensors["absmax_scale"] = scales.compress(absmax)
        tensors["codebook"] = codebook[None]
        return Storage(self.name, (N, K), weight.dtype, tensors, self.options)

    def dequantize(self, storage: Storage, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: one float32 product, rounded once to `dtype`."""
        return by_panels(storage, dtype, _decode)


def _decode(storage: Storage, dtype: torch.dtype) -> Tensor:
    absmax = storage["absmax"]
    if "absmax_scale" in storage.tensors:
        absmax = scales.expand(absmax, storage["absmax_scale"])
    values = storage["codebook"][0][storage["codes"].int()]
    blocks = split(values, storage.options["block_size"])
    return join(blocks.mul_(absmax[..., None]), storage.shape[1]).to(dtype)
