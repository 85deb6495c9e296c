"""Low-rank adapters beside the weights of the experts of a fused mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.grouped import grouped_mm
from lowrank.nn.quant_experts import (
    GROUPED,
    MATMULS,
    ExpertWeights,
    LikeWeights,
    QuantExperts,
    with_dense,
)

Branch = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, eq=False)
class AdaptedWeights(LikeWeights):
    """base + Σ s·L R over `branches` (L, R, s), as code written for a dense tensor takes it.

    Products with it are those with the base, and with one factor after the other: x (L R) is
    (x L) R. Any other function of torch sees the sum, made again for the backward.
    """

    base: Tensor | ExpertWeights
    branches: list[Branch]

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    def __getitem__(self, key: Any) -> AdaptedWeights:
        return AdaptedWeights(self.base[key], [(L[key], R[key], s) for L, R, s in self.branches])

    def transpose(self, dim0: int, dim1: int) -> AdaptedWeights:
        turned = [(R.mT, L.mT, s) for L, R, s in self.branches]
        return AdaptedWeights(self.base.transpose(dim0, dim1), turned)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense sum, of this shape."""
        base = self.base
        weight = base.to(dtype) if isinstance(base, Tensor) else base.dequantize(dtype)
        for L, R, s in self.branches:
            weight = weight + (s * L @ R).to(dtype)
        return weight

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple, kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Callable, args: tuple, kwargs: dict) -> Any:
    if torch.compiler.is_compiling():  # no graph has what is not a tensor
        return torch.compiler.disable(_call)(func, args, kwargs)
    y = None
    if func is F.linear:
        y = _linear(*args, **kwargs)
    elif func in MATMULS and len(args) == 2 and not kwargs:
        y = _matmul(func, *args)
    elif func in GROUPED:
        y = _grouped(func, *args, **kwargs)
    return with_dense(func, args, kwargs) if y is None else y


def _linear(input: Tensor, weight: AdaptedWeights, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(weight, AdaptedWeights):
        return None
    y = F.linear(input, weight.base, bias)
    for L, R, s in weight.branches:
        branch = F.linear(F.linear(input.to(R.dtype), R), L)
        y = (y + s * branch).to(y.dtype)
    return y


def _matmul(func: Callable, left: Any, right: Any) -> Tensor | None:
    if isinstance(left, AdaptedWeights) == isinstance(right, AdaptedWeights):
        return None
    weight, x = (left, right) if isinstance(left, AdaptedWeights) else (right, left)
    y = func(weight.base, x) if weight is left else func(x, weight.base)
    for L, R, s in weight.branches:
        z = x.to(L.dtype)
        branch = func(L, func(R, z)) if weight is left else func(func(z, L), R)
        y = (y + s * branch).to(y.dtype)
    return y


def _grouped(
    func: Callable, mat_a: Any, mat_b: Any, *, offs: Tensor | None = None, **options: Any
) -> Tensor | None:
    x, weight = mat_a, mat_b
    plain = offs is not None and x.dim() == 2 and all(o is None for o in options.values())
    if not plain or not isinstance(weight, AdaptedWeights):
        return None
    y = func(x, weight.base, offs=offs)
    ends = offs.cpu()  # a GPU is waited for once, not at each product
    for L, R, s in weight.branches:
        branch = grouped_mm(grouped_mm(x.to(L.dtype), L, offs=ends), R, offs=ends)
        y = (y + s * branch).to(y.dtype)
    return y


class DenseExperts(nn.Module):
    """The base of adapters on a parameter [E, N, K], or [E, K, N] if `transposed`."""

    def __init__(self, weight: nn.Parameter, transposed: bool = False) -> None:
        super().__init__()
        self.weight, self.transposed = weight, transposed

    @property
    def num_experts(self) -> int:
        return len(self.weight)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(E N, K)."""
        E, *sizes = self.weight.shape
        N, K = reversed(sizes) if self.transposed else sizes
        return E * N, K

    @property
    def weights(self) -> Tensor:
        return self.weight


class LoRAExperts(AdaptedLayer, LikeWeights):
    """W_e + Σ s·B_e A_e over the active adapters, for each expert e, where a parameter was.

    It stands where the parameter [E, N, K] or [E, K, N] stood, and is used as one, see
    AdaptedWeights. As in PEFT A is [E R, K], expert after expert, and B [N, R E], rank after rank:
    A_e is A.view(E, R, K)[e], B_e is B.view(N, R, E)[..., e].
    """

    takes_rows = False

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig, name: str) -> None:
        super().check(base, config, name)
        if not isinstance(base, DenseExperts | QuantExperts):
            raise TargetError(
                f"{name or 'wrap'}: expected the weights of experts; got {type(base).__name__}"
            )
        if set(super().part_shapes(base, config, name)) != {"lora_A", "lora_B"}:
            raise ConfigError(
                f"method: expected one of A and B alone for the experts {name}; "
                f"got {config.method!r}"
            )
        if config.lora_dropout:
            raise ConfigError(
                f"lora_dropout: expected 0 for the experts {name}, whose input is not seen here; "
                f"got {config.lora_dropout!r}"
            )

    @classmethod
    def matrix_shape_of(cls, base: nn.Module) -> tuple[int, int]:
        return base.matrix_shape

    @classmethod
    def part_shapes(
        cls, base: nn.Module, config: LoRAConfig, name: str = ""
    ) -> dict[str, tuple[int, ...]]:
        (rows, K), E, R = base.matrix_shape, base.num_experts, config.rank(name)
        return {"lora_A": (E * R, K), "lora_B": (rows // E, R * E)}

    @torch.no_grad()
    def init_(self, tensors: dict[str, Tensor], config: LoRAConfig) -> None:
        super().init_(tensors, config)
        if config.init_lora_weights == "gaussian":  # 1 / R is of one expert
            tensors["lora_A"].mul_(self.base_layer.num_experts)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A [E, R, K] and B [E, N, R]."""
        A, B = super().factors(adapter)
        E = self.base_layer.num_experts
        return A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W [E, N, K]."""
        base = self.unmerged_base
        weight = base.dequantize(dtype) if isinstance(base, QuantExperts) else base.weight.to(dtype)
        return weight.mT if base.transposed else weight

    def plain(self, matrix: Tensor) -> nn.Module:
        transposed = self.unmerged_base.transposed
        weight = matrix.mT.contiguous() if transposed else matrix
        return DenseExperts(nn.Parameter(weight, requires_grad=False), transposed)

    @property
    def weights(self) -> Tensor | ExpertWeights | AdaptedWeights:
        """All of them, as they are to be used now."""
        if self.disabled:
            return self.unmerged_base.weights
        if self.merged or not self.active_adapters:
            return self.base_layer.weights
        branches = []
        for adapter in self.active_adapters:
            A, B = self.factors(adapter)
            L, R = (A.mT, B.mT) if self.base_layer.transposed else (B, A)
            branches.append((L, R, self.scaling[adapter]))
        return AdaptedWeights(self.base_layer.weights, branches)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def shape(self) -> torch.Size:
        return self.base_layer.weights.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base_layer.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.base_layer.weights.device

    def __getitem__(self, key: Any) -> Tensor | ExpertWeights | AdaptedWeights:
        return self.weights[key]

    def transpose(self, dim0: int, dim1: int) -> Tensor | ExpertWeights | AdaptedWeights:
        return self.weights.transpose(dim0, dim1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weights with what adapters add, as the parameter was."""
        weights = self.weights
        return weights.to(dtype) if isinstance(weights, Tensor) else weights.dequantize(dtype)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple, kwargs: Any = None) -> Any:
        whole = [v.weights if isinstance(v, LoRAExperts) else v for v in args]
        named = {
            k: v.weights if isinstance(v, LoRAExperts) else v for k, v in (kwargs or {}).items()
        }
        return func(*whole, **named)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {super().extra_repr()}"
