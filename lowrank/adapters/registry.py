"""The methods by name: shapes, a start and two factors are enough to be one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from lowrank.errors import ConfigError

if TYPE_CHECKING:
    from .config import LoRAConfig


@runtime_checkable
class Method(Protocol):
    """ΔW = s·B A of a weight W [N, K], with A [R, K] and B [N, R] made of what is trained.

    `shapes` names the tensors of one layer's adapter, `init_` fills them in place, and `factors`
    makes (A, B) of them, differentiably; the layers do the rest. A class may also have
    - `frozen`: names of tensors that are not trained.
    """

    def shapes(self, N: int, K: int, r: int) -> dict[str, tuple[int, ...]]: ...

    def init_(self, tensors: Mapping[str, Tensor], config: LoRAConfig) -> None: ...

    def factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]: ...


_M = TypeVar("_M", bound=type)
_REGISTRY: dict[str, type] = {}


def register(name: str) -> Callable[[_M], _M]:
    """Class decorator: LoRAConfig(method=name) then makes adapters of this kind."""

    def add(cls: _M) -> _M:
        if _REGISTRY.get(name, cls) is not cls:
            raise ConfigError(
                f"method {name!r} is registered, by {_REGISTRY[name]}; choose another name"
            )
        _REGISTRY[name] = cls
        return cls

    return add


def names() -> list[str]:
    """Names of the registered methods, sorted."""
    return sorted(_REGISTRY)


def get(name: str) -> Method:
    """The method registered as `name`."""
    if name not in _REGISTRY:
        raise ConfigError(f"method: expected one of {', '.join(names())}; got {name!r}")
    return _REGISTRY[name]()
