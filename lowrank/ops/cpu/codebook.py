"""Codes to weights and back, and the products of a quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.ops import native

from .matrix_units import multiplies_bfloat16
from .panels import (
    PANEL,
    Weight,
    bfloat16_columns,
    dequantize_rows,
    empty,
    panels,
    pointers,
)
from .refusals import refuse_codebook, refuse_devices, refuse_dtype, refuse_weight

_DIRECT_M = 16  # rows of x up to which decoding inside the product beats a panel and BLAS
_DIRECT_ISAS = ("avx2", "avx512")  # and where it does, as measured, for more of them too:
_DECODED_ONCE_M = 512  # for any number, but of a weight that is one panel for so many
_BLAS_M = 1024  # and with AVX-512 up to here; then panels twice as large and BLAS are faster


def codebook_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 absmax of weight [N, K]; only its rows need to be contiguous."""
    N, K = weight.shape
    packed = empty(N, (K + 31) // 32 * 16, dtype=torch.uint8)
    absmax = empty(N, (K + block_size - 1) // block_size)
    status = native.load_cpu().lowrank_codebook_quantize(
        weight.data_ptr(), native.DTYPES[weight.dtype], N, K, weight.stride(0),
        codebook.data_ptr(), codebook.shape[0], block_size,
        packed.data_ptr(), absmax.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "codebook_quantize")
    return packed, absmax


def codebook_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] in `dtype`."""
    N = packed.shape[0]
    out = empty(N, K, dtype=dtype)
    dequantize_rows((packed, absmax, absmax_scale, codebook), K, block_size, 0, N, out)
    return out


def codebook_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """y = x Wᵀ + b for x [..., K]: [..., N] in the dtype of x."""
    weight = (packed, absmax, absmax_scale, codebook)
    if goes_by_panels(x, packed.shape[0]):
        return linear_by_panels(x, weight, bias, block_size)
    return linear_from_packed("lowrank_codebook_linear", x, weight, bias, block_size)


def goes_by_panels(x: Tensor, N: int) -> bool:
    """Whether a product of x and a weight [N, K] decodes panels and leaves the rest to BLAS."""
    M = rows_of(x)
    if M <= _DIRECT_M:
        return False
    isa = native.isa()
    if isa not in _DIRECT_ISAS or multiplies_bfloat16(x.dtype):
        return True
    if isa == "avx512" and M >= _BLAS_M:
        return True
    return M > _DECODED_ONCE_M and N * x.shape[-1] <= PANEL


def is_decoded_once(x: Tensor, N: int) -> bool:
    """Whether it decodes once for hundreds of rows of x, as it multiplies."""
    return rows_of(x) > _DIRECT_M and not goes_by_panels(x, N)


def goes_straight_back(dy: Tensor, K: int) -> bool:
    """Whether the weight of dx = dy W is decoded as it is multiplied."""
    return dy.dtype == torch.float32 and is_decoded_once(dy, K)


def panel_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which x and y of this dtype are multiplied by panels."""
    return dtype if multiplies_bfloat16(dtype) else torch.float32


def linear_by_panels(
    x: Tensor, weight: Weight, bias: Tensor | None, block_size: int, y: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b; added to `y` [M, N] of the panels' dtype, where one is given and no b."""
    N, K = weight[0].shape[0], x.shape[-1]
    dtype, fresh = panel_dtype(x.dtype), y is None
    rows = x.reshape(-1, K).to(dtype)  # [M, K]
    if y is None:
        y = empty(rows.shape[0], N, dtype=dtype)
    size = PANEL if rows.shape[0] < _BLAS_M else 2 * PANEL
    for n0, n1, w in panels(weight, K, block_size, dtype, size):
        if bias is not None:
            torch.addmm(bias[n0:n1].to(dtype), rows, w.T, out=y[:, n0:n1])
        else:
            y[:, n0:n1].addmm_(rows, w.T, beta=0 if fresh else 1)
    return y.to(x.dtype).view(*x.shape[:-1], N)


def codebook_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
) -> Tensor:
    """dx = dy W for dy [..., N]: [..., K] in the dtype of dy."""
    weight = (packed, absmax, absmax_scale, codebook)
    if goes_straight_back(dy, K):
        dx = empty(*dy.shape[:-1], K)
        backward_from_packed(dy.flatten(0, -2), None, weight, K, block_size, None, dx)
        return dx
    return dx_by_panels(dy, weight, K, block_size)


def dx_by_panels(
    dy: Tensor, weight: Weight, K: int, block_size: int, dx: Tensor | None = None
) -> Tensor:
    """dx = dy W; added to `dx` [M, K] of the panels' dtype, where one is given.

    In bfloat16 by columns: sums over panels of rows would be rounded at each panel.
    """
    dtype, beta = panel_dtype(dy.dtype), 0 if dx is None else 1
    rows = dy.reshape(-1, dy.shape[-1]).to(dtype)  # [M, N]
    if dx is None:
        dx = empty(rows.shape[0], K, dtype=dtype)
    if dtype == torch.bfloat16:
        for k0, k1, w in bfloat16_columns(weight, K, block_size):
            dx[:, k0:k1].addmm_(rows, w, beta=beta)
    else:
        for n0, n1, w in panels(weight, K, block_size, dtype):
            dx.addmm_(rows[:, n0:n1], w, beta=beta if n0 == 0 else 1)
    return dx.to(dy.dtype).view(*dy.shape[:-1], K)


def add_dx(dy: Tensor, weight: Weight, K: int, block_size: int, dx: Tensor) -> None:
    """dx += dy W for dy [M, N], dx [M, K] of the panels' dtype."""
    if goes_straight_back(dy, K):
        backward_from_packed(dy, None, weight, K, block_size, None, dx, add=True)
    else:
        dx_by_panels(dy, weight, K, block_size, dx)


def backward_from_packed(
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
    K: int,
    block_size: int,
    lora: int | None,
    dx: Tensor | None,
    dA: Tensor | None = None,
    dB: Tensor | None = None,
    add: bool = False,
) -> None:
    """The gradients of x [M, K], A and B from dy [M, N], straight from packed codes, in float32."""
    dy = dy.contiguous()
    kernel = "lowrank_codebook_lora_backward"
    addresses = [None if t is None else t.data_ptr() for t in (dy, x, dx, dA, dB)]
    status = getattr(native.load_cpu(), kernel)(
        *addresses[:2], len(dy), *pointers(weight), dy.shape[1], K, block_size, lora, addresses[2],
        add, *addresses[3:], torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, kernel)


def linear_from_packed(
    kernel: str, x: Tensor, weight: Weight, bias: Tensor | None, block_size: int, *beside: int
) -> Tensor:
    """x [..., K] -> y [..., N] by the C function of this name, straight from packed codes.

    `beside` is the address of an adapter, for the function that takes one.
    """
    *leading, K = x.shape
    N, x = weight[0].shape[0], x.contiguous()
    y = x.new_empty((*leading, N))
    if bias is not None:
        bias = bias.float().contiguous()
    status = getattr(native.load_cpu(), kernel)(
        x.data_ptr(), native.DTYPES[x.dtype], rows_of(x), *pointers(weight), N, K, block_size,
        None if bias is None else bias.data_ptr(), *beside, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, kernel)
    return y


def rows_of(x: Tensor) -> int:
    """M of x [..., K]."""
    return x.shape[:-1].numel()


def _refuse_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> str | None:
    if weight.dim() != 2:
        return "the weight is not a matrix"
    if weight.shape[1] > 1 and weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        return "the rows of the weight are not contiguous, or overlap"
    return (
        refuse_dtype(weight.dtype)
        or refuse_devices(weight, codebook)
        or refuse_codebook(codebook, weight.shape[0], block_size)
    )


def _refuse_dequantize(packed, absmax, absmax_scale, codebook, K, block_size, dtype) -> str | None:
    weight = (packed, absmax, absmax_scale, codebook)
    return refuse_dtype(dtype) or refuse_weight(weight, K, block_size)


def _refuse_linear(x, packed, absmax, absmax_scale, codebook, bias, block_size) -> str | None:
    weight = (packed, absmax, absmax_scale, codebook)
    if x.dim() == 0:
        return "x is not [..., K]"
    others = (x,) if bias is None else (x, bias)
    if bias is not None and bias.shape != packed.shape[:1]:
        return "the bias is not [N]"
    return refuse_dtype(x.dtype) or refuse_weight(weight, x.shape[-1], block_size, *others)


def _refuse_linear_dx(dy, packed, absmax, absmax_scale, codebook, K, block_size) -> str | None:
    weight = (packed, absmax, absmax_scale, codebook)
    if dy.dim() == 0 or dy.shape[-1] != packed.shape[0]:
        return "dy is not [..., N]"
    return refuse_dtype(dy.dtype) or refuse_weight(weight, K, block_size, dy)


REFUSALS = {
    "codebook_quantize": _refuse_quantize,
    "codebook_dequantize": _refuse_dequantize,
    "codebook_linear": _refuse_linear,
    "codebook_linear_dx": _refuse_linear_dx,
}
