"""PiSSA: an adapter that starts as the principal part of the weight, the base being the rest.

Meng et al., arXiv:2404.02948; QPiSSA if the rest is quantized, §4 and appendix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import svd
from .loftq import loftq


@torch.no_grad()
def pissa(
    weight: Tensor, r: int, niter: int | None = None, scaling: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(W - s·B A, A [R, K], B [N, R]) with s·B A = SVD_R(W); the rest in the dtype of `weight`.

    `niter` is that of a fast SVD, as in PEFT's pissa_niter_4; None: an exact one.

    Raises WeightError for a NaN or inf in W.
    """
    matrix = svd.checked(weight, r, 1, scaling)
    floor = torch.finfo(matrix.dtype).eps * matrix.norm().item()
    A, B = svd.factors(matrix, r, scaling, floor, niter)
    return (matrix - scaling * B @ A).to(weight.dtype), A, B


@torch.no_grad()
def qpissa(
    weight: Tensor,
    quantizer: Any,
    r: int,
    num_iter: int = 1,
    niter: int | None = None,
    scaling: float = 1.0,
) -> tuple[Any, Tensor, Tensor]:
    """(Q, A [R, K], B [N, R]) with Q + s·B A near W [N, K]; T = `num_iter` times

        s·B A <- SVD_R(W - Q),   Q <- quantize(W - s·B A)

    from Q = 0; `niter` is that of `pissa`. The iteration with the least error |W - Q - s·B A| is
    returned, as by `loftq`; and `loftq`'s result where even that exceeds quantizing alone, as it
    may for weights that the codes hold exactly.

    Raises WeightError for a NaN or inf in W.
    """
    matrix = svd.checked(weight, r, num_iter, scaling)
    norm = matrix.norm().item()
    floor = torch.finfo(matrix.dtype).eps * norm
    rest, least, best = matrix, float("inf"), None
    for _ in range(num_iter):
        A, B = svd.factors(rest, r, scaling, floor, niter)
        product = scaling * B @ A
        storage = quantizer.quantize((matrix - product).to(weight.dtype))
        rest = matrix - quantizer.dequantize(storage, matrix.dtype)
        error = (rest - product).norm().item()
        if error < least:
            least, best = error, (storage, A, B)
    alone = matrix - quantizer.dequantize(quantizer.quantize(weight), matrix.dtype)
    if least > alone.norm().item() + torch.finfo(weight.dtype).eps * norm:
        return loftq(weight, quantizer, r, scaling=scaling)
    return best
