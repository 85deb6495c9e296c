"""The quantizers by name: two functions are enough to be one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lowrank.errors import ConfigError
from lowrank.quant.storage import Storage

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

ENTRY_POINTS = "lowrank.quantizers"


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


_Q = TypeVar("_Q", bound=type)
_REGISTRY: dict[str, type] = {}


def register(name: str) -> Callable[[_Q], _Q]:
    """Class decorator: `get(name, **options)` makes `cls(**options)`; `cls.name` is the name.

    Raises ConfigError for a name that is another's, and for what has no quantize and dequantize.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"register: expected the name of a scheme; got {name!r}")

    def add(cls: _Q) -> _Q:
        if not isinstance(cls, type) or not issubclass(cls, Quantizer):
            raise ConfigError(
                f"quantizer {name!r}: expected a class with quantize and dequantize; got {cls!r}"
            )
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


def known() -> list[str]:
    """Names that `get` takes, sorted: the registered ones, and the entry points of packages."""
    return sorted({*_REGISTRY, *(point.name for point in _entry_points())})


def get(name: str, **options) -> Quantizer:
    """The quantizer registered as `name`, made with its own explicit options.

    A name that is not registered is looked up among the entry points `lowrank.quantizers` of the
    installed packages.
    """
    cls = _find(name)
    parameters = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in set() if takes_any else options.keys() - parameters.keys():
        takes = ", ".join(parameters) or "none"
        raise ConfigError(f"quantizer {name!r}: expected its own options, {takes}; got {option!r}")
    for option, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or "VAR_" in parameter.kind.name
        if not optional and option not in options:
            raise ConfigError(
                f"quantizer {name!r}: expected its option {option}, which has no default; in "
                f"Python, quant.get({name!r}, {option}=...) makes one"
            )
    try:
        return cls(**options)
    except TypeError as error:
        raise ConfigError(f"quantizer {name!r}: {error}") from error


def quantizer_of(storage: Storage) -> Quantizer:
    """A quantizer that reads `storage`, by its scheme's name and its options."""
    from_storage = getattr(_find(storage.scheme), "from_storage", None)
    if from_storage is None:
        return get(storage.scheme, **storage.options)
    try:
        return from_storage(storage)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"quantizer {storage.scheme!r}: {error}") from error


def _find(name: str) -> type:
    if not isinstance(name, str) or name not in _REGISTRY:
        _load(name)
    return _REGISTRY[name]


def _entry_points() -> EntryPoints:
    from importlib.metadata import entry_points  # only here: it reads the disk

    return entry_points(group=ENTRY_POINTS)


def _load(name: str) -> None:
    """Register the entry point of this name: a class, or a module that registers it."""
    found = [point for point in _entry_points() if point.name == name]
    if not found:
        raise ConfigError(f"quantizer: expected one of {', '.join(known())}; got {name!r}")
    if len({point.value for point in found}) > 1:
        owners = ", ".join(sorted(point.value for point in found))
        raise ConfigError(f"quantizer {name!r}: expected one entry point; got {owners}")
    try:
        loaded = found[0].load()
    except Exception as error:  # whatever somebody else's module raises
        raise ConfigError(
            f"quantizer {name!r}: its entry point {found[0].value} fails to load: {error!r}"
        ) from error
    if name not in _REGISTRY and isinstance(loaded, type) and issubclass(loaded, Quantizer):
        register(name)(loaded)
    if name not in _REGISTRY:
        raise ConfigError(
            f"quantizer {name!r}: expected its entry point {found[0].value} to be a class with "
            f"quantize and dequantize; got {loaded!r}"
        )
