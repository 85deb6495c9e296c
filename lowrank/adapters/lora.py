"""LoRA: W + s·B A, A [R, K] and B [N, R] trained, W [N, K] frozen.   arXiv:2106.09685, §4.1.

The product y = x Wᵀ + b + s·drop(x) Aᵀ Bᵀ is `ops.lora_linear`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, WeightError

from .registry import register

if TYPE_CHECKING:
    from .config import LoRAConfig


@register("lora")
class LoRA:
    """ΔW = s·B A, both trained."""

    is_lora = True

    def shapes(self, N: int, K: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (r, K), "lora_B": (N, r)}

    def init_(self, tensors: Mapping[str, Tensor], config: LoRAConfig) -> None:
        init_(tensors["lora_A"], tensors["lora_B"], config.init_lora_weights)

    def factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tensors["lora_A"], tensors["lora_B"]


def scaling(r: int, alpha: float, rslora: bool = False) -> float:
    """s = alpha / R, or alpha / sqrt(R) when rank-stabilized.   rsLoRA, arXiv:2312.03732."""
    return alpha / math.sqrt(r) if rslora else alpha / r


@torch.no_grad()
def init_(A: Tensor, B: Tensor, how: bool | str = True) -> None:
    """Fill A [R, K] and B [N, R] in place.

    True: A ~ U(±1/sqrt(K)), B = 0, so that training starts at the base model.
    "gaussian": A ~ N(0, (1/R)²), B = 0.
    False: A as above and B ~ U(±1/sqrt(R)): not the base model; for tests.
    "orthogonal": neither is zero, and yet B A = 0; R is even.
    """
    if how == "orthogonal":
        _orthogonal_(A, B)
        return
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        _uniform_(A)
    if how is False:
        _uniform_(B)
    else:
        B.zero_()


def _uniform_(matrix: Tensor) -> None:
    """Kaiming's with a = sqrt(5), as nn.Linear starts."""
    bound = 1 / math.sqrt(matrix.shape[1])
    matrix.uniform_(-bound, bound)


def _orthogonal_(A: Tensor, B: Tensor) -> None:
    """A = Q₁ᵀ X / 10 and B = Y Q₂ / 10, the rows of Q₁ and Q₂ [R / 2, R] orthonormal together.

    X [R / 2, K] and Y [N, R / 2] are normal. Where B has G times fewer columns than A has rows, as
    in a convolution of G groups, this is done for each.   datta0.github.io/posts/rethink-lora-init
    """
    R = B.shape[1]
    if R % 2:
        raise ConfigError(
            f"r: expected an even one in each group for init_lora_weights='orthogonal'; got {R}"
        )
    wide = {"dtype": torch.promote_types(A.dtype, torch.float32), "device": A.device}
    parts = A.split(R)
    for some_A, some_B in zip(parts, B.chunk(len(parts)), strict=True):
        Q = torch.linalg.qr(torch.randn(R, R, **wide)).Q
        some_A.copy_(Q[0::2].T @ torch.randn(R // 2, A.shape[1], **wide) / 10)
        some_B.copy_(torch.randn(len(some_B), R // 2, **wide) @ Q[1::2] / 10)


def merged_weight(
    weight: Tensor, branches: Iterable[tuple[Tensor, Tensor, float]], dtype: torch.dtype
) -> Tensor:
    """W + Σ s·B A over branches (A, B, s): a new [N, K] of `dtype`, or [E, N, K] of experts.

    Summed in at least float32 and rounded once; to be called without gradients.

    Raises WeightError if the result is not finite.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight if weight.dtype is wide else weight.to(wide)
    for A, B, s in branches:
        add = torch.addmm if merged.dim() == 2 else torch.baddbmm
        own = {} if merged is weight else {"out": merged}  # the first product is a new tensor
        merged = add(merged, B.to(wide), A.to(wide), alpha=s, **own)
    if merged.dtype is not dtype or merged is weight:
        merged = merged.to(dtype, copy=True)
    if not math.isfinite(merged.sum()) and not merged.isfinite().all():  # a sum may overflow
        raise WeightError(
            f"merged weight: expected finite values in {dtype}; got NaN or inf: damaged adapter?"
        )
    return merged


def folded(branches: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """(A [1, R, K], B [1, N, R], s) with s·B A = Σ sᵢ·Bᵢ Aᵢ over branches (Aᵢ, Bᵢ, sᵢ).

    Of several, the ranks add up and the scales are folded into B; of one, A and B are views.
    """
    if len(branches) == 1:
        A, B, s = branches[0]
        return A[None], B[None], s
    A = torch.cat([A for A, _, _ in branches])
    B = torch.cat([s * B for _, B, s in branches], dim=1)
    return A[None], B[None], 1.0
