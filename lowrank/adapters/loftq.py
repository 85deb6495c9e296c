"""LoftQ: an adapter that starts with what quantization loses.   Li et al., arXiv:2310.08659."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import svd


@torch.no_grad()
def loftq(
    weight: Tensor, quantizer: Any, r: int, num_iter: int = 1, scaling: float = 1.0
) -> tuple[Any, Tensor, Tensor]:
    """(Q, A [R, K], B [N, R]) with Q + s·B A near W [N, K]; algorithm 1, T = `num_iter` times

        Q <- quantize(W - s·B A),   s·B A <- SVD_R(W - Q)

    from B A = 0. Q is the Storage of `quantizer`; A and B are float32, or float64 for a float64 W.
    The error |W - Q - s·B A| may rise again: the pair with the least is returned. It is below that
    of quantizing alone, and with one iteration Q is what quantizing alone gives.

    Raises WeightError for a NaN or inf in W.
    """
    matrix = svd.checked(weight, r, num_iter, scaling)
    floor = torch.finfo(matrix.dtype).eps * matrix.norm().item()
    product, least, best = 0.0, float("inf"), None
    for _ in range(num_iter):
        storage = quantizer.quantize((matrix - product).to(weight.dtype))
        lost = matrix - quantizer.dequantize(storage, matrix.dtype)
        A, B = svd.factors(lost, r, scaling, floor)
        product = scaling * B @ A
        error = (lost - product).norm().item()
        if error < least:
            least, best = error, (storage, A, B)
    return best
