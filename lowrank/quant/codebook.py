"""Weights as 4-bit codes into a table of 16 values, scaled block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank import ops
from lowrank.errors import ConfigError, ShapeError

from . import checks
from . import double_quant as scales
from .blockwise import Blockwise
from .registry import register
from .storage import Storage


@register("codebook")
class CodebookQuantizer(Blockwise):
    """w[n, k] = codebook[code[n, k]] * absmax[n, k // G], for any table of 16 values in [-1, 1].

    `codebook` is 16 values in any order, twice the same too, or one such row for each row of the
    weight [N, 16]. Blocks of G = `block_size` never cross rows. With `double_quant` the absmax are
    kept in 8 bits.

    The Storage holds packed uint8 [N, ceil(K / 32) * 16] (even element in the high nibble), absmax
    float32 [N, ceil(K / G)] or uint8 with absmax_scale float32 [N, 2], and codebook [T, 16].
    """

    def __init__(
        self, codebook: Tensor | Sequence[float], block_size: int = 64, double_quant: bool = False
    ) -> None:
        try:
            values = codebook.tolist() if isinstance(codebook, Tensor) else codebook
            table = torch.tensor(values, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ConfigError(
                f"codebook: expected 16 numbers or [N, 16] of them; {error}"
            ) from error
        if table.dim() not in (1, 2) or table.shape[-1] != 16 or table.numel() == 0:
            raise ShapeError(
                f"codebook: expected 16 values or [N, 16]; got shape {list(table.shape)}"
            )
        if not bool(torch.isfinite(table).all()) or bool((table.abs() > 1).any()):
            raise ConfigError(
                "codebook: expected values in [-1, 1], which absmax scales; got others; "
                "divide them by their largest magnitude"
            )
        self.codebook = table.reshape(-1, 16)  # [T, 16]
        super().__init__(block_size, double_quant)

    @classmethod
    def from_storage(cls, storage: Storage) -> CodebookQuantizer:
        """The quantizer with the table that the storage has."""
        return cls(storage["codebook"], **storage.options)

    @property
    def row_local(self) -> bool:
        """Whether quantizing a slice of rows gives that slice of the whole."""
        return self.codebook.shape[0] == 1

    def table_for(self, weight: Tensor) -> Tensor:
        """The float32 table [1, 16] or [N, 16] for this weight, which is not float64."""
        return self.codebook.to(weight.device, copy=True)

    def quantize(self, weight: Tensor) -> Storage:
        """Nearest codes of weight [N, K]; a tie goes to the lower. WeightError: NaN or inf."""
        source = checks.matrix(weight)
        codebook = self.table_for(source)
        packed, absmax = ops.codebook_quantize(source, codebook, self.block_size)
        checks.finite(absmax)
        tensors = {"packed": packed, "absmax": absmax}
        if self.double_quant:
            tensors["absmax"], tensors["absmax_scale"] = scales.compress(absmax)
        tensors["codebook"] = codebook
        return Storage(self.name, tuple(weight.shape), weight.dtype, tensors, self.options)

    def dequantize(self, storage: Storage, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: one float32 product, rounded once to `dtype`."""
        *weight, block_size = self.codebook_operands(storage)
        return ops.codebook_dequantize(*weight, storage.shape[1], block_size, dtype)

    def linear(self, x: Tensor, storage: Storage, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + b straight from the codes; differentiable in x and bias."""
        if x.shape[-1:] != tuple(storage.shape[1:]):  # K to within 31 has the same packed bytes
            raise ShapeError(f"x: expected [..., K={storage.shape[1]}]; got {list(x.shape)}")
        *weight, block_size = self.codebook_operands(storage)
        return ops.codebook_linear(x, *weight, bias, block_size)

    def codebook_operands(
        self, storage: Storage
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int]:
        """packed, absmax, absmax_scale, codebook and block size, as the operators take them."""
        scale, block_size = storage.tensors.get("absmax_scale"), storage.options["block_size"]
        return storage["packed"], storage["absmax"], scale, storage["codebook"], block_size


class FixedCodebook(CodebookQuantizer):
    """A scheme of one table: a subclass gives `table`, 16 values, and `@register` its name."""

    table: Sequence[float]

    def __init__(self, block_size: int = 64, double_quant: bool = True) -> None:
        super().__init__(self.table, block_size, double_quant)

    @classmethod
    def from_storage(cls, storage: Storage) -> FixedCodebook:
        return cls(**storage.options)
