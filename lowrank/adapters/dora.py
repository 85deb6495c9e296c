"""DoRA: m ∘ (W + s·B A) / ||W + s·B A||, rows rescaled to a trained magnitude m [N].

Norms are those of the rows of W [N, K], and constants for the gradient.   arXiv:2402.09353, §4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lora import LoRA
from .registry import register


@register("dora")
class DoRA(LoRA):
    """LoRA with a magnitude; it starts as the norms, so that nothing is rescaled yet."""

    magnitude = "lora_magnitude_vector"

    def shapes(self, N: int, K: int, r: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(N, K, r), self.magnitude: (N,)}


def norms(squares: Tensor, products: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """||W + s·B A|| of each row [N], from `squares` = ||W||² [N] and `products` = A Wᵀ [R, N].

        ||w + s b A||² = ||w||² + 2s b·(A wᵀ) + s² b·(A Aᵀ bᵀ)    for a row w [K], b [R]

    W itself is not needed, nor anything of its size. A norm of 0 comes as the least there is, so
    that a row of zeros stays one.
    """
    crossed = (2 * s) * products + (s * s) * (A @ A.T) @ B.T  # [R, N]
    found = squares + torch.linalg.vecdot(B, crossed.T)
    return found.clamp(min=torch.finfo(found.dtype).tiny).sqrt()
