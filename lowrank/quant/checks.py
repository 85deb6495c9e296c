"""What every scheme refuses, in the same words."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank import ops
from lowrank.errors import ConfigError, DtypeError, ShapeError, WeightError
from lowrank.ops.checks import WEIGHTS, check_tensors

from .storage import Storage


def matrix(weight: Tensor) -> Tensor:
    """`weight` [N, K] detached, in float32 if it was float64. Raises DtypeError, ShapeError."""
    check_tensors(weight=weight)
    if weight.dtype not in (*WEIGHTS, torch.float64):
        raise DtypeError(
            f"weight: expected a floating-point dtype of 16 bits or more; got {weight.dtype}"
        )
    if weight.dim() != 2 or weight.numel() == 0:
        raise ShapeError(f"weight: expected [N, K] with N, K >= 1; got {list(weight.shape)}")
    weight = weight.detach()
    return weight.float() if weight.dtype == torch.float64 else weight


def finite(scales: Tensor, first_row: int = 0, what: str = "finite values; got NaN or inf") -> None:
    """WeightError naming the row of the first NaN or inf in `scales` [n, ...] of the weight."""
    if not scales.is_meta and not bool(torch.isfinite(scales).all()):
        row = first_row + int((~torch.isfinite(scales)).nonzero()[0, 0])
        raise WeightError(f"weight: expected {what} in row {row}")


def storage(value: Storage) -> Storage:
    """`value`, if it is a Storage."""
    if not isinstance(value, Storage):
        raise ConfigError(
            f"storage: expected a quant.Storage, which quantize(weight) makes; got "
            f"{type(value).__name__}"
        )
    return value


def block_size(value: int) -> int:
    """`value`, if it is one of the sizes from 32 to 4096."""
    if not isinstance(value, int) or value not in ops.BLOCK_SIZES:
        raise ConfigError(f"block_size: expected a power of two from 32 to 4096; got {value!r}")
    return value


def flag(name: str, value: bool) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected True or False; got {value!r}")
    return value
