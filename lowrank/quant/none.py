"""No quantization, where the name of a scheme is asked for: the weight itself, frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.ops.checks import check_float

from . import checks
from .blocks import panels
from .registry import register
from .storage import Storage


@register("none")
class Unquantized:
    """The Storage holds dense [N, K], a copy in the weight's dtype; nothing is lost."""

    row_local = True

    def quantize(self, weight: Tensor) -> Storage:
        """Raises DtypeError, ShapeError, and WeightError at a NaN or inf, as the others do."""
        checks.matrix(weight)
        dense = weight.detach().clone(memory_format=torch.contiguous_format)
        for start, stop in panels(*weight.shape, weight.device):
            checks.finite(dense[start:stop], start)
        return Storage(self.name, tuple(weight.shape), weight.dtype, {"dense": dense})

    def dequantize(self, storage: Storage, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of the weight [N, K], rounded to `dtype` if that is narrower."""
        check_float("dtype", dtype)
        return storage["dense"].to(dtype, copy=True)
