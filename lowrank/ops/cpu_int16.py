"""The CPU kernels, with few rows of x multiplied in 16-bit fixed point: asked for by name only.

`use_backend("cpu_int16")` or LOWRANK_BACKEND=cpu_int16 trades accuracy for the speed of decoding:
at M = 1 the weight is multiplied almost as fast as it can be read. Codebook values are rounded to
16 bits and each 64 elements of x to 14 bits: ||y - exact|| / ||exact|| is about 1e-4 and within
2e-4 of random activations, between float32 (1e-7) and bfloat16 (2e-3). All else, the gradients and
more rows of x too, is as exact as on "cpu".
"""

from __future__ import annotations

from torch import Tensor

from .cpu import adamw8bit_step as adamw8bit_step
from .cpu import codebook as exact
from .cpu import codebook_dequantize as codebook_dequantize
from .cpu import codebook_linear_dx as codebook_linear_dx
from .cpu import codebook_quantize as codebook_quantize
from .cpu import gated as gated
from .cpu import gated_backward as gated_backward
from .cpu import linear_cross_entropy as linear_cross_entropy
from .cpu import lion8bit_step as lion8bit_step
from .cpu import lora
from .cpu import lora_linear_backward as lora_linear_backward
from .cpu import missing as missing
from .cpu import refuse as refuse
from .cpu import rms_norm as rms_norm
from .cpu import rms_norm_backward as rms_norm_backward
from .cpu import rotate as rotate

_DIRECT_M = 8  # rows of x up to which this is faster than the exact kernels


def codebook_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """y = x Wᵀ + b for x [..., K]: [..., N] in the dtype of x, NaN where x is not finite."""
    if exact.rows_of(x) > _DIRECT_M:
        return exact.codebook_linear(x, packed, absmax, absmax_scale, codebook, bias, block_size)
    weight = (packed, absmax, absmax_scale, codebook)
    return exact.linear_from_packed("lowrank_codebook_linear_int16", x, weight, bias, block_size)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    *branch,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + scale * h B[e]ᵀ [..., N], and h [M, R]; only the product with W is inexact."""
    if codebook is None or exact.rows_of(x) > _DIRECT_M:
        packed = (weight, absmax, absmax_scale, codebook)
        return lora.lora_linear(x, *packed, bias, block_size, *branch)
    y = codebook_linear(x, weight, absmax, absmax_scale, codebook, bias, block_size)
    return lora.with_branch(y, x, *branch)
