"""bitsandbytes' tensors of one layer ↔ Storage, bit for bit. Format: bitsandbytes 0.50.

A layer is a mapping of tensors whose keys have no prefix. Its 4-bit keys are

- `weight`: the packed bytes [n, 1], in any dtype, whose bits they are;
- `weight.absmax`, `weight.quant_map`, and of nested scales `weight.nested_absmax` and
  `weight.nested_quant_map`;
- `weight.quant_state.bitsandbytes__nf4` or `__fp4`: JSON as uint8;

those of LLM.int8 are `weight` int8 [N, K], `SCB` [N] and `weight_format`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lowrank.errors import ConfigError, FileFormatError, ShapeError
from lowrank.quant import checks
from lowrank.quant.flat import Flat
from lowrank.quant.int8 import Int8
from lowrank.quant.storage import Storage

from . import four_bit, int8_rows


def is_key(key: str) -> bool:
    """Whether a tensor of this name, without prefix, is part of the weight of such a layer."""
    return key.split(".")[0] == "weight" or key in int8_rows.KEYS


def is_layer(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a bitsandbytes layer, or what is left of one."""
    return four_bit.is_layer(tensors) or int8_rows.is_layer(tensors)


def read(
    tensors: Mapping[str, Tensor], name: str = "", shape: Sequence[int] | None = None
) -> Storage:
    """The Storage of one layer's `tensors` (keys without the layer's prefix, which is `name`).

    `shape` is what the weight must have: ShapeError. One of experts, [E, N, K], becomes the matrix
    [E N, K] of all rows; without a `shape` it is refused.

    Equal bit for bit to what bitsandbytes computes with: scheme nf4 or fp4 where a row is a number
    of whole blocks, nested scales as the float32 they stand for; else flat, which keeps the bytes;
    int8 for rows of int8. Keys that are not `is_key` are left alone. Raises FileFormatError.
    """
    kind = four_bit if four_bit.is_layer(tensors) else int8_rows
    for key in tensors:
        if is_key(key) and key != "weight" and key not in kind.KEYS:
            raise FileFormatError(
                f"{name}{key}: expected beside weight only {', '.join(sorted(kind.KEYS))}; "
                "got this too"
            )
    storage = kind.read(tensors, name)
    *leading, K = storage.shape
    matrix = (math.prod(leading), K)
    if tuple(storage.shape) != tuple(matrix if shape is None else shape):
        expected = "[N, K]" if shape is None else list(shape)
        raise ShapeError(
            f"{name}weight: expected a weight of {expected}; got {list(storage.shape)}"
        )
    return replace(storage, shape=matrix)


def write(storage: Storage) -> dict[str, Tensor]:
    """bitsandbytes' tensors of one layer (keys without prefix), of the same weights bit for bit.

    Scales in 8 bits of our own become plain float32; a flat Storage is written as it was read.
    ConfigError for what bitsandbytes cannot compute with.
    """
    if checks.storage(storage).scheme == Int8.name:
        return int8_rows.write(storage)
    if storage.scheme == Flat.name:
        return four_bit.write(storage)
    if "codebook" in storage.tensors and "packed" in storage.tensors:
        return four_bit.write(four_bit.as_flat(storage))
    raise ConfigError(
        f"scheme: expected nf4, fp4, flat or int8 for bitsandbytes; got {storage.scheme!r}; "
        "quantize the original weights with one of these"
    )
