"""VeRA: ΔW = s·diag(b) B diag(d) A, two trained vectors between frozen random matrices.

A [R, K] and B [N, R] are the same for all layers of a shape: made of a seed, held once for all of
them, and in no file.   arXiv:2310.11454; the paper has no s: that is lora_alpha = r.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .registry import register

if TYPE_CHECKING:
    from .config import LoRAConfig

_held: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()


@register("vera")
class VeRA:
    """d starts at 0.1 and b at zero, so that training starts at the base model."""

    def shapes(self, N: int, K: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_d": (r,), "vera_lambda_b": (N,)}

    def init_(self, tensors: Mapping[str, Tensor], config: LoRAConfig) -> None:
        torch.nn.init.constant_(tensors["vera_lambda_d"], 0.1)
        torch.nn.init.zeros_(tensors["vera_lambda_b"])

    def shared(self, N: int, K: int, r: int, device: torch.device) -> dict[str, Tensor]:
        return {"vera_A": _projection(r, K, 0, device), "vera_B": _projection(N, r, 1, device)}

    def factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        d, b = tensors["vera_lambda_d"], tensors["vera_lambda_b"]
        return d[:, None] * tensors["vera_A"], b[:, None] * tensors["vera_B"]


def _projection(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """[rows, columns] ~ U(±sqrt(6 / columns)), the same numbers on every device."""
    key = (rows, columns, seed, torch.device(device))
    if (found := _held.get(key)) is None:
        bound, generator = math.sqrt(6 / columns), torch.Generator().manual_seed(seed)
        numbers = torch.empty(rows, columns, device="cpu")
        found = numbers.uniform_(-bound, bound, generator=generator).to(device)
        _held[key] = found
    return found
