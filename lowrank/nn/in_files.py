"""What a layer's adapter trains, and how PEFT's files have it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank.adapters import registry
from lowrank.adapters.config import LoRAConfig


class InFiles(nn.Module):
    """The half of an AdaptedLayer that says which tensors an adapter has, here and in files.

    What is asked before there is an adapter is asked of the class, about a base layer.
    """

    @classmethod
    def matrix_shape_of(cls, base: nn.Module) -> tuple[int, int]:
        """(N, K) of the matrix that the weight of `base` is read as."""
        raise NotImplementedError

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) of the matrix that the base's weight is read as."""
        return self.matrix_shape_of(self.unmerged_base)

    @classmethod
    def part_shapes(
        cls, base: nn.Module, config: LoRAConfig, name: str = ""
    ) -> dict[str, tuple[int, ...]]:
        """The tensors that an adapter on `base` trains, by the names of its method."""
        return registry.get(config.method).shapes(*cls.matrix_shape_of(base), config.rank(name))

    @classmethod
    def file_shapes(
        cls, base: nn.Module, config: LoRAConfig, name: str = ""
    ) -> dict[str, tuple[int, ...]]:
        """The same as PEFT's files have them, by the keys there, from the layer's name on."""
        method = registry.get(config.method)
        return {
            cls.file_key(part, method): cls.file_shape(base, part, shape)
            for part, shape in cls.part_shapes(base, config, name).items()
        }

    @classmethod
    def file_key(cls, part: str, method: registry.Method) -> str:
        """What PEFT's files call the tensor `part` of a method."""
        return part if part == getattr(method, "magnitude", "") else f"{part}.weight"

    @classmethod
    def file_shape(cls, base: nn.Module, part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `part` in PEFT's files; the numbers lie in the same order."""
        return shape

    def to_file(self, adapter: str) -> dict[str, Tensor]:
        """What PEFT's files have of the adapter, by the keys of `file_shapes`."""
        method, base = self.method(adapter), self.unmerged_base
        return {
            self.file_key(part, method): t.reshape(self.file_shape(base, part, tuple(t.shape)))
            for part, t in self.tensors(adapter).items()
        }

    @torch.no_grad()
    def from_file(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Fill the adapter with what `to_file` gives; `tensors` may have more."""
        for part, tensor in self.tensors(adapter).items():
            held = tensors[self.file_key(part, self.method(adapter))]
            tensor.copy_(held.reshape(tensor.shape))
