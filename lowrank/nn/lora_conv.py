"""Convolutions with low-rank adapters beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.adapters.dora import DoRA
from lowrank.errors import ConfigError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.held import replaced

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class LoRAConv(AdaptedLayer):
    """y = W * x + b + Σ s·B * (A * drop(x)), W [N, C / groups, k...] frozen, * a convolution.

    A * x is one like the base's, of all C channels to R, with its kernel, stride, padding and
    dilation; B is one of size 1, in the base's groups. The matrix is [N, K = C·k...]: A [R, K];
    B [N, R / groups], its rows those of PEFT's [N, R / groups, 1...]; W with zeros between groups.

    As A reads all channels, a grouped layer with an adapter merged into it has groups=1.
    """

    def __init__(self, base: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(base)
        self.in_channels, self.out_channels = base.in_channels, base.out_channels

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig, name: str) -> None:
        super().check(base, config, name)
        kind = next((kind for kind in CONVOLUTIONS if isinstance(base, kind)), None)
        if kind is None:
            raise TargetError(
                f"{name or 'wrap'}: expected nn.Conv1d, nn.Conv2d or nn.Conv3d; "
                f"got {type(base).__name__}"
            )
        cls.check_forward(base, kind, name)
        if base.groups > 1 and "lora_B" not in super().part_shapes(base, config, name):
            raise ConfigError(
                f"method: expected one with B, {name or 'the layer'} has {base.groups} groups; "
                f"got {config.method!r}"
            )
        if config.rank(name) % base.groups:
            raise ConfigError(
                f"r: expected a multiple of the {base.groups} groups of {name or 'the layer'}; "
                f"got {config.rank(name)}"
            )

    @classmethod
    def check_forward(cls, base: nn.Module, kind: type[nn.Module], name: str) -> None:
        """Raises TargetError if `base` is of a class that does not compute what `kind` does.

        A subclass for convolutions with another padding overrides it, and `convolve`.
        """
        if any(
            getattr(type(base), f) is not getattr(kind, f) for f in ("forward", "_conv_forward")
        ):
            raise TargetError(
                f"{name or 'wrap'}: expected {kind.__name__}; got {type(base).__name__}, which "
                "computes something else; see lowrank.register_layer"
            )

    @classmethod
    def matrix_shape_of(cls, base: nn.Module) -> tuple[int, int]:
        return base.out_channels, base.in_channels * math.prod(base.kernel_size)

    @classmethod
    def part_shapes(
        cls, base: nn.Module, config: LoRAConfig, name: str = ""
    ) -> dict[str, tuple[int, ...]]:
        shapes = super().part_shapes(base, config, name)
        if base.groups > 1:
            N, R = shapes["lora_B"]
            shapes["lora_B"] = (N, R // base.groups)
        return shapes

    @classmethod
    def file_shape(cls, base: nn.Module, part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if part == "lora_A":
            return (shape[0], base.in_channels, *base.kernel_size)
        ones = (1,) * len(base.kernel_size)
        if part == "lora_B":
            return (*shape, *ones)
        return (1, *shape, *ones) if part == DoRA.magnitude else shape

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        A, B = super().factors(adapter)
        groups = self.unmerged_base.groups
        if groups > 1:
            B = torch.block_diag(*B.chunk(groups))
        return A, B

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = self.unmerged_base
        ones = (1,) * len(base.kernel_size)
        y = self.convolve(x.to(A.dtype), A.unflatten(1, (base.in_channels, *base.kernel_size)))
        return self.function(y, B.unflatten(1, (-1, *ones)))

    def over_rows(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, *(1,) * len(self.unmerged_base.kernel_size)))

    @property
    def function(self) -> Callable[..., Tensor]:
        """conv1d, conv2d or conv3d."""
        base = self.unmerged_base
        return next(f for kind, f in CONVOLUTIONS.items() if isinstance(base, kind))

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the base would compute with `weight` [R, C, k...] and no groups nor bias."""
        base = self.unmerged_base
        padding = base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, _margins(base), base.padding_mode), 0
        return self.function(x, weight, None, base.stride, padding, base.dilation)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        base = self.unmerged_base
        rows = base.weight.to(dtype).flatten(1)
        return rows if base.groups == 1 else torch.block_diag(*rows.chunk(base.groups))

    def plain(self, matrix: Tensor) -> nn.Module:
        base = self.unmerged_base
        weight = matrix.unflatten(1, (base.in_channels, *base.kernel_size))
        plain = replaced(base, weight=weight)
        plain.groups = 1
        return plain

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {super().extra_repr()}"


def _margins(base: nn.Module) -> list[int]:
    """What F.pad takes: two numbers for each dimension, the last one first."""
    margins = []
    for i in reversed(range(len(base.kernel_size))):
        if isinstance(base.padding, str):
            width = base.dilation[i] * (base.kernel_size[i] - 1) if base.padding == "same" else 0
            margins += [width // 2, width - width // 2]
        else:
            margins += [base.padding[i]] * 2
    return margins
