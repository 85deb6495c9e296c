"""The methods by name: shapes, a start and two factors are enough to be one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from lowrank.registry import Registry

if TYPE_CHECKING:
    from .config import LoRAConfig


@runtime_checkable
class Method(Protocol):
    """ΔW = s·B A of a weight W [N, K], with A [R, K] and B [N, R] made of what is trained.

    `shapes` names the tensors of one layer's adapter, `init_` fills them in place, and `factors`
    makes (A, B) of them, differentiably; the layers do the rest. A class may also have
    - `frozen`: names of tensors that are not trained, but saved;
    - `shared(N, K, r, device)`: tensors that no layer has to itself, by name, made of a seed or the
      like, neither trained nor saved; `factors` gets them with the others;
    - `magnitude`: the name of one tensor, m [N]; the rows of W + s·B A are then rescaled to it, and
      it is filled with their norms after `init_`;
    - `is_lora = True`: the files are those of LoRA, for any program that reads such.
    """

    def shapes(self, N: int, K: int, r: int) -> dict[str, tuple[int, ...]]: ...

    def init_(self, tensors: Mapping[str, Tensor], config: LoRAConfig) -> None: ...

    def factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]: ...


REGISTRY: Registry[Method] = Registry("method", "lowrank.methods", Method)
register, names, known, get = REGISTRY.register, REGISTRY.names, REGISTRY.known, REGISTRY.get
