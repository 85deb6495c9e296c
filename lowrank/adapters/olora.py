"""OLoRA: an adapter that starts as the first part of W's QR decomposition.   arXiv:2406.01775."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import svd


@torch.no_grad()
def olora(
    weight: Tensor, quantizer: Any, r: int, scaling: float = 1.0
) -> tuple[Any, Tensor, Tensor]:
    """(W - s·B A, A [R, K], B [N, R]) with B the first R columns of Q and A the first rows of R.

    W = Q R, so B spans the first R columns of W, and A = Bᵀ W. The rest is a Storage of
    `quantizer`, or for None dense, in the dtype of `weight`.

    Raises WeightError for a NaN or inf in W.
    """
    matrix = svd.checked(weight, r, 1, scaling)
    wide = matrix.double()
    B = torch.linalg.qr(wide[:, :r]).Q
    A, B = svd.padded((B.T @ wide).to(matrix), B.to(matrix), r)
    rest = (matrix - scaling * B @ A).to(weight.dtype)
    return rest if quantizer is None else quantizer.quantize(rest), A, B
