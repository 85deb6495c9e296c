"""A Storage in a state dict: its tensors as integers, and JSON that tells what they are.

The JSON is one uint8 tensor, so it lives in safetensors and survives sharding, and it is computed
without the weight, so it survives the meta device. Its keys are `version`, `scheme`, `options`,
`shape`, `dtype` of the weight before quantization, and `tensors`: the dtype of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import DtypeError, FileFormatError
from lowrank.ops.checks import check_tensors

from .storage import Storage

VERSION = 1

# A float kept as integer bits: `.to(bf16)`, autocast and mixed precision then leave it alone.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """`tensor` detached, a float one viewed as integers of its size."""
    return tensor.detach().view(_kept_as(tensor.dtype))


@dataclass(frozen=True)
class Description:
    """A Storage without its tensors, of which it knows the dtypes."""

    scheme: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    options: Mapping[str, int | float | bool | str]

    def tensor(self) -> Tensor:
        """The description as a state dict holds it, uint8 on the CPU."""
        text = {
            "version": VERSION,
            "scheme": self.scheme,
            "options": dict(self.options),
            "shape": list(self.shape),
            "dtype": _name(self.dtype),
            "tensors": {name: _name(dtype) for name, dtype in self.dtypes.items()},
        }
        return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8, device="cpu")

    def storage(self, tensors: Mapping[str, Tensor], name: str = "") -> Storage:
        """The Storage whose tensors, floats as their bits, are among `tensors`, as views.

        `name` is the prefix that errors give. FileFormatError: one is missing; DtypeError.
        """
        taken = {}
        for key, dtype in self.dtypes.items():
            if key not in tensors:
                raise FileFormatError(
                    f"{name}{key}: expected for {self.scheme}, {dict(self.options)}, which the "
                    "state dict describes; it is missing"
                )
            check_tensors(**{name + key: tensors[key]})
            if tensors[key].dtype != _kept_as(dtype):
                raise DtypeError(
                    f"{name}{key}: expected {_kept_as(dtype)} for {self.scheme}, "
                    f"{dict(self.options)}; got {tensors[key].dtype}"
                )
            taken[key] = tensors[key].detach().view(dtype)
        return Storage(self.scheme, self.shape, self.dtype, taken, self.options)


def read_description(tensor: Tensor, name: str) -> Description:
    """The description in `tensor`, which is called `name`. FileFormatError: damaged, or newer."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise FileFormatError(
            f"{name}: expected JSON as uint8 [n]; got {tensor.dtype} {list(tensor.shape)}"
        )
    try:
        text = json.loads(bytes(tensor.tolist()))
        version = text["version"]
        if isinstance(version, int) and version > VERSION:
            raise FileFormatError(
                f"{name}: expected a format version up to {VERSION}; got {version}; "
                "it needs a newer lowrank"
            )
        shape = tuple(text["shape"])
        valid = (
            version == VERSION
            and isinstance(text["scheme"], str)
            and isinstance(text["options"], dict)
            and all(isinstance(value, int | float | str) for value in text["options"].values())
            and all(isinstance(size, int) and size > 0 for size in shape)
        )
        dtypes = {key: _dtype(dtype) for key, dtype in text["tensors"].items()}
        dtype = _dtype(text["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"{name}: expected JSON that describes a quantized weight; got {error!r}"
        ) from error
    if not valid or not dtype.is_floating_point:
        raise FileFormatError(
            f"{name}: expected version, scheme, options, shape and dtype of a quantized weight; "
            f"got {text}"
        )
    return Description(text["scheme"], shape, dtype, dtypes, text["options"])


def _kept_as(dtype: torch.dtype) -> torch.dtype:
    return _BITS[dtype.itemsize] if dtype.is_floating_point else dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype
