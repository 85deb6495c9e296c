"""The quantizers by name: two functions are enough to be one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowrank.errors import ConfigError
from lowrank.quant.storage import Storage
from lowrank.registry import Registry


@runtime_checkable
class Quantizer(Protocol):
    """weight [N, K] -> Storage -> weight [N, K]; nothing else in the library knows the scheme.

    A class may also have
    - `row_local = True`: rows know nothing of each other. Every tensor of its Storage is [N, ...],
      a part for each row, or [1, ...], shared, and a slice of rows quantizes to that slice. Such a
      weight is dequantized some rows at a time when training, and may be sharded;
    - `dequantize_rows(storage, start, stop, dtype)`: rows start <= n < stop of the weight, where a
      scheme that is not row_local can decode them without the others;
    - `linear(x, storage, bias) -> y`: a faster y = x Wᵀ + b than dequantizing;
    - `codebook_operands(storage)`: the operands of `ops.codebook_linear`, if that is the product;
      LoRA is then fused with it;
    - `from_storage(storage)`, a class method: an instance for that Storage, if
      `cls(**storage.options)` is none.
    """

    def quantize(self, weight: Tensor) -> Storage: ...

    def dequantize(self, storage: Storage, dtype: torch.dtype) -> Tensor: ...


REGISTRY: Registry[Quantizer] = Registry("quantizer", "lowrank.quantizers", Quantizer)
register, names, known, get = REGISTRY.register, REGISTRY.names, REGISTRY.known, REGISTRY.get


def quantizer_of(storage: Storage) -> Quantizer:
    """A quantizer that reads `storage`, by its scheme's name and its options."""
    from_storage = getattr(REGISTRY.find(storage.scheme), "from_storage", None)
    if from_storage is None:
        return get(storage.scheme, **storage.options)
    try:
        return from_storage(storage)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"quantizer {storage.scheme!r}: {error}") from error
