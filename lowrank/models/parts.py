"""Modules whose children go by what they do here, and by their family's names in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lowrank.models.config import DecoderConfig
from lowrank.models.layers import RMSNorm, RMSNormPlusOne


class Part(nn.Module):
    """A module of a decoder. A child is registered under the name its family has for its part."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.names = config.family.names

    def have(self, **children: nn.Module) -> None:
        """Register children by part: have(out=nn.Linear(H, H)) is `o_proj` in a Llama."""
        for part, child in children.items():
            setattr(self, self.names[part], child)


def part(name: str) -> Any:
    """The child of that part, under whatever name; None where the family has none.

    It is looked up at each use, as surgery puts other modules in its place.
    """
    return property(lambda self: self._modules.get(self.names.get(name)))


def make_norm(config: DecoderConfig, size: int) -> nn.Module:
    """The norm of the family over `size` numbers."""
    return _NORMS[config.family.norm](size, config.rms_norm_eps)


_NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": RMSNorm,
    "rms_plus_one": RMSNormPlusOne,
    "layer": nn.LayerNorm,
}
