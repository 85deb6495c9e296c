"""The quantizers by name: two functions are enough to be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lowrank.errors import ConfigError
from lowrank.quant.storage import Storage


@runtime_checkable
class Quantizer(Protocol):
    """weight [N, K] -> Storage -> weight [N, K]; nothing else in the library knows the scheme.

    An instance may also have `linear(x, storage, bias) -> y`, a faster y = x Wᵀ + b than
    dequantizing, and `row_local = False` if its statistics span the whole tensor (default True:
    quantizing a slice of rows gives that slice of the quantized whole).
    """

    def quantize(self, weight: Tensor) -> Storage: ...

    def dequantize(self, storage: Storage, dtype: torch.dtype) -> Tensor: ...


_Q = TypeVar("_Q", bound=type)
_REGISTRY: dict[str, type] = {}


def register(name: str) -> Callable[[_Q], _Q]:
    """Class decorator: `get(name, **options)` makes `cls(**options)`; `cls.name` is the name."""

    def add(cls: _Q) -> _Q:
        if _REGISTRY.get(name, cls) is not cls:
            raise ConfigError(
                f"quantizer {name!r} is registered, by {_REGISTRY[name]}; choose another name"
            )
        _REGISTRY[name] = cls
        cls.name = name
        return cls

    return add


def names() -> list[str]:
    """Names of the registered quantizers, sorted."""
    return sorted(_REGISTRY)


def get(name: str, **options) -> Quantizer:
    """The quantizer registered as `name`, made with its own explicit options."""
    if name not in _REGISTRY:
        raise ConfigError(f"quantizer: expected one of {', '.join(names())}; got {name!r}")
    try:
        return _REGISTRY[name](**options)
    except TypeError as error:
        raise ConfigError(f"quantizer {name!r}: {error}") from error
