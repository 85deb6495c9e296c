"""One tensor of a layer: there, of the right dtype and shape, finite; or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowrank.errors import FileFormatError

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def entry(
    tensors: Mapping[str, Tensor],
    key: str,
    name: str,
    dtypes: Sequence[torch.dtype],
    size: int | None = None,
) -> Tensor:
    """`tensors[key]` as it is, after the checks; `name` is the layer's prefix.

    With a `size` it is a vector of so many finite numbers.
    """
    tensor = tensors.get(key)
    if tensor is None:
        raise FileFormatError(f"{name}{key}: missing; expected beside the layer's other tensors")
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
        raise FileFormatError(
            f"{name}{key}: expected a dense tensor with values; got {describe(tensor)}"
        )
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise FileFormatError(f"{name}{key}: expected {expected}; got {describe(tensor)}")
    if size is None:  # bits of whatever dtype, or any shape
        return tensor
    if tensor.shape != (size,):
        raise FileFormatError(f"{name}{key}: expected shape [{size}]; got {describe(tensor)}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise FileFormatError(f"{name}{key}: expected finite numbers; got NaN or inf")
    return tensor


def describe(value: object) -> str:
    """Dtype and shape, or the type of what is no tensor."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    where = " on meta" if value.is_meta else ""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{where}"
