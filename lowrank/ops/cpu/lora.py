"""The LoRA branch beside a frozen weight: in the product that decodes, or what BLAS begins with.

Where x is float32 and keeps all its elements, BLAS works on its rows where they lie. Else one
native pass brings them into a panel of float32: gathered, widened and dropped out at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.ops import native
from lowrank.ops.reference import adapter_bounds, threshold

from . import codebook as products
from .panels import Weight, empty, scratch
from .refusals import refuse_devices, refuse_dtype, refuse_weight

# Elements of x or y at once: 2 MB of float32 where they go through scratch, which a cache should
# keep; else 8 MB, as BLAS is slow on few rows.
_PANEL, _PANEL_IN_PLACE = 1 << 19, 1 << 21


class _Rows(NamedTuple):
    """Rows of x that have one adapter: order[first], ... or first, first + 1, ... without order."""

    order: Tensor | None
    first: int
    count: int

    @property
    def index(self) -> slice | Tensor:
        span = slice(self.first, self.first + self.count)
        return span if self.order is None else self.order[span].long()


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + scale * h B[e]ᵀ [..., N] and h = z A[e]ᵀ [M, R], z = x after dropout."""
    N, packed = B.shape[1], (weight, absmax, absmax_scale, codebook)
    if codebook is not None and not products.goes_by_panels(x, N):
        if order is None and products.is_decoded_once(x, N):
            return _within_product(x, packed, bias, block_size, A[0], B[0], scale, p, seed)
        y = products.codebook_linear(x, *packed, bias, block_size)
        return with_branch(y, x, A, B, scale, order, offsets, p, seed)
    # y begins as bias and branch, and BLAS adds to it as fast as it would write y anew
    h = _down(x, A, order, offsets, p, seed)
    dtype = x.dtype if codebook is None else products.panel_dtype(x.dtype)
    y = _room(len(h), N, dtype, order)
    if bias is not None:
        y.copy_(bias)
    _up(h, B, scale, order, offsets, y, add=bias is not None)
    if codebook is not None:
        products.linear_by_panels(x, packed, None, block_size, y)
    elif weight is not None:
        y.addmm_(_matrix(x, A.shape[2]), weight.T)
    return y.to(x.dtype).view(*x.shape[:-1], N), h


def _within_product(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    block_size: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same of the one adapter A [R, K], B [N, R]: x is read and y is written in one product."""
    dropout = _dropout(p, seed)
    A, B = A.float().contiguous(), B.float().contiguous()
    h = empty(products.rows_of(x), A.shape[0])
    lora = native.Lora(
        A.data_ptr(), B.data_ptr(), h.data_ptr(), A.shape[0], scale,
        None if dropout is None else ctypes.addressof(dropout),
    )  # fmt: skip
    kernel = "lowrank_codebook_lora_linear"
    beside = ctypes.addressof(lora)
    return products.linear_from_packed(kernel, x, weight, bias, block_size, beside), h


def with_branch(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The results of lora_linear from y, the fresh and contiguous product of the base."""
    h = _down(x, A, order, offsets, p, seed)
    _up(h, B, scale, order, offsets, y.view(-1, B.shape[1]), add=True)
    return y, h


def _up(
    h: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    y: Tensor,
    add: bool,
) -> None:
    """y [M, N] = scale * h B[e]ᵀ in rows that have an adapter, or += with `add`."""
    B = B.float()
    for e, rows in _rows_of_adapters(*y.shape, y.dtype, order, offsets, None):
        _put_product(h[rows.index] * scale, B[e].T, y, rows, None, add)


def _down(
    x: Tensor,
    A: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """h = z A[e]ᵀ [M, R] in float32, 0 in rows of no adapter."""
    rows_of_x, dropout, A = _matrix(x, A.shape[2]), _dropout(p, seed), A.float()
    h = torch.zeros(rows_of_x.shape[0], A.shape[1], dtype=torch.float32, device="cpu")
    for e, rows in _rows_of_adapters(*rows_of_x.shape, x.dtype, order, offsets, dropout):
        h[rows.index] = torch.mm(_panel(rows_of_x, rows, dropout), A[e].T)
    return h


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    block_size: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., K], dA, dB of scale * z A[e]ᵀ B[e]ᵀ, and dx of x Wᵀ."""
    N, K, packed = B.shape[1], A.shape[2], (weight, absmax, absmax_scale, codebook)
    rows_of_dy, rows_of_x = _matrix(dy, N), _matrix(x, K) if needs[1] else x
    native_dx = codebook is not None and products.goes_straight_back(dy, K)
    if native_dx and order is None and seed is None:
        branch = (rows_of_dy, rows_of_x, h, packed, block_size, A[0], B[0], scale)
        dx, dA, dB = _within_product_backward(*branch, needs)
    else:
        # dx begins as the branch, as y does
        branch = (rows_of_dy, rows_of_x, h, A.float(), B.float(), scale)
        in_place = order is None and seed is None and dy.dtype == torch.float32 and all(needs)
        if in_place and len(rows_of_dy) * max(N, K) <= _PANEL_IN_PLACE:
            dx, dA, dB = _branch_at_once(*branch)
        else:
            dtype = dy.dtype if codebook is None else products.panel_dtype(dy.dtype)
            of_rows = (order, offsets, _dropout(p, seed), needs)
            dx, dA, dB = _branch_by_panels(*branch, *of_rows, dtype)
        if needs[0] and codebook is not None:
            products.add_dx(rows_of_dy, packed, K, block_size, dx)
        elif needs[0] and weight is not None:
            dx.addmm_(rows_of_dy, weight)
    if needs[0]:
        dx = dx.to(dy.dtype).view(*dy.shape[:-1], K)
    return dx, dA.to(A.dtype), dB.to(B.dtype)


def _within_product_backward(
    dy: Tensor, x: Tensor, h: Tensor, weight: Weight, block_size: int, A: Tensor, B: Tensor,
    scale: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dA and dB of the one adapter A [R, K], B [N, R]: dy is read in one product."""
    A, B, (R, K), N = A.float().contiguous(), B.float().contiguous(), A.shape, B.shape[0]
    shapes = (len(dy), K), (1, R, K), (1, N, R)
    made = [empty(*(shape if need else (0,))) for shape, need in zip(shapes, needs, strict=True)]
    h = h.contiguous()
    lora = native.Lora(A.data_ptr(), B.data_ptr(), h.data_ptr(), R, scale, None)
    products.backward_from_packed(
        dy, x.contiguous(), weight, K, block_size, ctypes.addressof(lora),
        *(tensor if need else None for tensor, need in zip(made, needs, strict=True)),
    )  # fmt: skip
    return tuple(made)


def _branch_at_once(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB of the only adapter and of rows that are one panel where they lie.

    A step of a model is hundreds of these: asking for panels takes as long as these products.
    """
    g = torch.mm(dy, B[0]).mul_(scale)
    dBt = torch.mm(h.T, dy).mul_(scale)  # (hᵀ dy)ᵀ: twice as fast as dyᵀ h on a skinny h
    return torch.mm(g, A[0]), torch.mm(g.T, x)[None], dBt.T.contiguous()[None]


def _branch_by_panels(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    dropout: native.Dropout | None,
    needs: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of any: with g = scale * dy B[e], each panel of dy serves g and dB at once."""
    (E, N, R), K, M = B.shape, A.shape[2], dy.shape[0]
    dA = torch.zeros((E, R, K) if needs[1] else (0,), dtype=torch.float32, device="cpu")
    dBt = torch.zeros((E, R, N) if needs[2] else (0,), dtype=torch.float32, device="cpu")
    dx = _room(M, K, dtype, order) if needs[0] else empty(0, dtype=dy.dtype)
    for e, rows in _rows_of_adapters(M, max(N, K), dy.dtype, order, offsets, dropout):
        panel = _panel(dy, rows, None)
        if needs[2]:  # (hᵀ dy)ᵀ: twice as fast as dyᵀ h on a skinny h
            dBt[e].addmm_(h[rows.index].T, panel, alpha=scale)
        if needs[0] or needs[1]:
            g = torch.mm(panel, B[e]).mul_(scale)
        if needs[1]:
            dA[e].addmm_(g.T, _panel(x, rows, dropout))
        if needs[0]:
            _put_product(g, A[e], dx, rows, dropout, add=False)
    return dx, dA, dBt.mT.contiguous() if needs[2] else dBt


def _rows_of_adapters(
    M: int,
    width: int,
    dtype: torch.dtype,
    order: Tensor | None,
    offsets: Tensor | None,
    dropout: native.Dropout | None,
) -> Iterator[tuple[int, _Rows]]:
    """(adapter, rows), as many at once as are a panel of this width."""
    in_place = order is None and dropout is None and dtype == torch.float32
    height = max(1, (_PANEL_IN_PLACE if in_place else _PANEL) // width)
    bounds = adapter_bounds(order, offsets, M)
    for e, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        among = order
        if order is not None and last > first:
            # the rows of one sequence, mostly: no need to gather what lies together
            begin = int(order[first])
            together = torch.arange(begin, begin + last - first, dtype=torch.int32)
            if 0 <= begin <= M - (last - first) and torch.equal(order[first:last], together):
                among, first, last = None, begin, begin + last - first
        for row in range(first, last, height):
            yield e, _Rows(among, row, min(height, last - row))


def _panel(matrix: Tensor, rows: _Rows, dropout: native.Dropout | None) -> Tensor:
    """Those rows of `matrix` in float32, where they lie or in this thread's scratch."""
    if rows.order is None and dropout is None and matrix.dtype == torch.float32:
        return matrix[rows.index]
    M, C = matrix.shape
    out = scratch(rows.count, C)
    status = native.load_cpu().lowrank_gather_rows(
        matrix.data_ptr(), native.DTYPES[matrix.dtype], C, matrix.stride(0),
        _native_rows(rows, M), _by_reference(dropout), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "lora_linear: rows of x")
    return out


def _put_product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    rows: _Rows,
    dropout: native.Dropout | None,
    add: bool,
) -> None:
    """Those rows of `out` = left right after dropout, or += with `add`; not with this scratch."""
    if rows.order is None and dropout is None and out.dtype == torch.float32:
        out[rows.index].addmm_(left, right, beta=int(add))
        return
    M, C = out.shape
    values = torch.mm(left, right, out=scratch(rows.count, C))
    status = native.load_cpu().lowrank_scatter_rows(
        values.data_ptr(), C, _native_rows(rows, M), _by_reference(dropout), add, out.data_ptr(),
        native.DTYPES[out.dtype], out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "lora_linear: rows of y")


def _matrix(x: Tensor, columns: int) -> Tensor:
    """[..., columns] -> [M, columns], of any stride between rows but none within."""
    x = x.reshape(-1, columns)
    return x if x.stride(1) == 1 else x.contiguous()


def _room(M: int, N: int, dtype: torch.dtype, order: Tensor | None) -> Tensor:
    """What the branch is written to; rows of no adapter are not written, and stay 0."""
    return empty(M, N, dtype=dtype) if order is None else empty(M, N, dtype=dtype).zero_()


def _dropout(p: float, seed: Tensor | None) -> native.Dropout | None:
    return None if seed is None else native.Dropout(int(seed), threshold(p), 1 / (1 - p))


def _native_rows(rows: _Rows, M: int) -> object:
    order = None if rows.order is None else rows.order.data_ptr()
    return _by_reference(native.Rows(order, rows.first, rows.count, M))


def _by_reference(structure: ctypes.Structure | None) -> object:
    """Its address, and its life for as long as a call lasts."""
    return None if structure is None else ctypes.byref(structure)


def _refuse_lora(
    x, weight, absmax, absmax_scale, codebook, bias, block_size, A, B, scale, order, offsets, p,
    seed,
):  # fmt: skip
    if bias is not None and (weight is None or bias.shape != B.shape[1:2]):
        return "the bias is not [N], or has no weight"
    return _refuse(
        x, A.shape[-1], weight, absmax, absmax_scale, codebook, block_size, A, B, order, offsets,
        p, seed, *(() if bias is None else (bias,)),
    )  # fmt: skip


def _refuse_lora_backward(
    dy, x, h, weight, absmax, absmax_scale, codebook, block_size, A, B, scale, order, offsets, p,
    seed, needs,
):  # fmt: skip
    M = dy.shape[:-1].numel()
    if needs[1] and (x.dtype != dy.dtype or x.numel() != M * A.shape[-1]):
        return "x is not [..., K] of the dtype of dy"
    if needs[2] and (h.dtype != torch.float32 or h.shape != (M, A.shape[1])):
        return "h is not float32 [M, R]"
    return _refuse(
        dy, B.shape[1], weight, absmax, absmax_scale, codebook, block_size, A, B, order, offsets,
        p, seed, x, h,
    )  # fmt: skip


def _refuse(
    x, columns, weight, absmax, absmax_scale, codebook, block_size, A, B, order, offsets, p, seed,
    *others,
) -> str | None:  # fmt: skip
    """The same of both; x [..., columns] is x or dy."""
    if A.dim() != 3 or B.dim() != 3 or A.shape[:2] != (B.shape[0], B.shape[2]):
        return "A and B are not [E, R, K] and [E, N, R]"
    if 0 in (*A.shape, *B.shape) or x.dim() == 0 or x.shape[-1] != columns:
        return "x, A and B do not fit, or are empty"
    if (order is None) != (offsets is None) or (order is None and A.shape[0] != 1):
        return "order and offsets do not come together"
    if order is not None:
        for tensor, length in ((order, x.shape[:-1].numel()), (offsets, A.shape[0] + 1)):
            if tensor.dtype != torch.int32 or tensor.shape != (length,):
                return "order and offsets are not int32 [M] and [E + 1]"
            if not tensor.is_contiguous():
                return "order or offsets is not contiguous"
        others = (*others, order, offsets)
    if (seed is None) != (p == 0) or (seed is not None and seed.dtype != torch.int64):
        return "seed is not int64 with p > 0, and None without"
    if seed is not None:
        others = (*others, seed)
    reason = refuse_dtype(x.dtype) or refuse_dtype(A.dtype) or refuse_dtype(B.dtype)
    reason = reason or refuse_devices(x, A, B, *others)
    if reason is not None or weight is None:
        return reason
    if codebook is not None and absmax is not None:
        if weight.shape[:1] != B.shape[1:2]:
            return "packed and B have not the same N"
        return refuse_weight((weight, absmax, absmax_scale, codebook), A.shape[2], block_size)
    if weight.shape != (B.shape[1], A.shape[2]) or weight.dtype != x.dtype:
        return "the weight is not [N, K] of the dtype of x"
    return refuse_devices(weight)


REFUSALS = {"lora_linear": _refuse_lora, "lora_linear_backward": _refuse_lora_backward}
