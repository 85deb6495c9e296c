"""Hard inputs for the CUDA kernels, and what their products may be off by."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops.interpreted_dequantize import random_weight
from tests.ops.weights import dense

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [32, 64, 128, 4096]
# Ragged and whole; more chunks than the warps take at once; fewer, and more, rows than a tile.
SHAPES = [(1, 1), (5, 33), (17, 63), (33, 123), (40, 640), (9, 2304), (70, 96)]
ADAMW_SHAPES = [(5, 700), (3, 256), (40, 16), (7,), (), (3, 5, 3, 3), (1, 1000), (2, 33), (70, 1)]

# Of a number to the nearest of a dtype.
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_SUMS = 1e-6  # of at most 4608 products: random signs, so far below the worst case


def allowed_error(
    x: Tensor,
    weight: tuple,
    K: int,
    G: int,
    bias: Tensor | None,
    codebook_rounded: bool = True,
) -> Tensor:
    """The bound [M, N] that `linear_from_codes` states, for x [M, K], in float64.

    Without the rounding of the codebook it is that of a product with a codebook rounded before.
    """
    packed, absmax, scale, codebook = weight
    w, dtype = dense(packed, absmax, scale, codebook, K, G).double().abs(), x.dtype
    sums = x.double().abs() @ w.T
    error = _SUMS * sums
    if codebook_rounded and dtype != torch.float32:
        error = error + _ROUNDING[dtype] * sums
    if codebook_rounded and dtype == torch.float16:  # which has a least step, too
        largest = codebook.abs().amax(1, keepdim=True).expand(packed.shape[0], 16)
        scales = dense(packed, absmax, scale, largest.contiguous(), K, G).double().abs()
        error = error + 2.0**-25 * (x.double().abs() @ scales.T)
    total = sums if bias is None else sums + bias.double().abs()
    total = total + error
    return error + (2.0**-24 + _ROUNDING[dtype]) * total + torch.finfo(dtype).smallest_normal


def rounded(weight: tuple, dtype: torch.dtype) -> tuple:
    """The weight with its codebooks rounded to `dtype` relative to powers of two, but for float32.

    The power is the next below a codebook's largest magnitude.
    """
    packed, absmax, scale, codebook = weight
    if dtype == torch.float32:
        return weight
    _, exponent = codebook.abs().amax(1, keepdim=True).frexp()  # of a number in [0.5, 1)
    near = torch.ldexp(codebook, 1 - exponent).to(dtype).float()
    return packed, absmax, scale, torch.ldexp(near, exponent - 1)


def product(x: Tensor, weight: tuple, K: int, G: int, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b in float64, of the values that the weight stands for."""
    y = x.double() @ dense(*weight, K, G).double().T
    return y if bias is None else y + bias.double()


def cases(generator: torch.Generator):
    """(N, K, G, weight) over all shapes and block sizes, kinds of scales and codebooks in turn."""
    for i, (N, K) in enumerate(SHAPES):
        for j, G in enumerate(BLOCKS):
            double_quant, per_row = (i + j) % 2 == 0, (i + j // 2) % 2 == 0
            yield N, K, G, random_weight(N, K, G, double_quant, per_row, generator)
