"""Tensors beside a layer, and another weight within one."""

from __future__ import annotations

import copy

from torch import Tensor, nn


class Held(nn.Module):
    """One tensor of one adapter, frozen until the adapter is activated."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)

    def extra_repr(self) -> str:
        return str(list(self.weight.shape))


class Transposed(nn.Module):
    """The tensor of another adapter, transposed: of a head tied to an embedding."""

    def __init__(self, held: Held) -> None:
        super().__init__()
        self._held = [held]  # in a list: it is trained, counted and kept where it is

    @property
    def weight(self) -> Tensor:
        return self._held[0].weight.T


def replaced(module: nn.Module, **weights: Tensor) -> nn.Module:
    """The same layer around other weights, frozen; its other parameters are shared."""
    twin = copy.copy(module)
    frozen = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
    twin._parameters = {**module._parameters, **frozen}
    return twin
