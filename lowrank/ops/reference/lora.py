"""A frozen weight with a low-rank branch beside it, or many branches, each for its rows of x."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank.errors import DataError

from .codebook import decode
from .panels import cast, compute_dtype, panels
from .philox import kept


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
    """y = x Wᵀ + b + scale * h B[e]ᵀ with h = z A[e]ᵀ and z = x / (1 - p) where kept, else 0.

    Each of the M rows of x has its own adapter e, or none and h = 0; without a weight, y is the
    branch alone. Returns y [..., N] in the dtype of x, rounded once, and h [M, R].
    LoRA, arXiv:2106.09685, §4.1; which elements are kept: `philox`.
    """
    K, N, R, dtype = x.shape[-1], B.shape[1], B.shape[2], compute_dtype(x)
    rows_of_x = x.reshape(-1, K)  # [M, K]
    M = rows_of_x.shape[0]
    y = torch.zeros(M, N, dtype=dtype, device=x.device)
    h = torch.zeros(M, R, dtype=dtype, device=x.device)
    if weight is not None:
        wide = rows_of_x.to(dtype)
        for some, w in _decoded(weight, absmax, absmax_scale, codebook, K, block_size, dtype):
            torch.mm(wide, w.T, out=y[:, some])
    if bias is not None:
        y += bias
    for e, rows in _rows_of_adapters(M, K, order, offsets, x.device):
        z = _dropped_out(rows_of_x[rows].to(dtype), rows, p, seed)
        h_rows = z @ A[e].to(dtype).T
        h.index_copy_(0, rows, h_rows)
        y.index_add_(0, rows, h_rows @ B[e].to(dtype).T, alpha=scale)
    return y.to(x.dtype).view(*x.shape[:-1], N), h


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
    """The gradients of lora_linear in x, A and B; with g = scale * dy B[e], over the rows of e

        dA[e] = Σ g[m]ᵀ z[m],   dB[e] = scale Σ dy[m]ᵀ h[m],   dx = dy W + (g A[e]) / (1 - p)

    the last term where kept. Of `needs` = (dx, dA, dB), what is False comes back empty, and its
    operands are not looked at: x serves dA only, h dB only, the weight dx only.
    """
    N, K, dtype = B.shape[1], A.shape[2], compute_dtype(dy)
    rows_of_dy = dy.reshape(-1, N).to(dtype)  # [M, N]
    rows_of_x = x.reshape(-1, K) if needs[1] else x  # [M, K]
    M = rows_of_dy.shape[0]
    dx = rows_of_dy.new_zeros((M, K) if needs[0] else 0)
    dA = rows_of_dy.new_zeros(A.shape if needs[1] else 0)
    dB = rows_of_dy.new_zeros(B.shape if needs[2] else 0)
    if needs[0] and weight is not None:
        for some, w in _decoded(weight, absmax, absmax_scale, codebook, K, block_size, dtype):
            dx.addmm_(rows_of_dy[:, some], w)
    for e, rows in _rows_of_adapters(M, K, order, offsets, dy.device):
        some = rows_of_dy[rows]
        if needs[2]:
            dB[e] += scale * (some.T @ h[rows])
        if needs[0] or needs[1]:
            g = scale * (some @ B[e].to(dtype))
            if needs[1]:
                dA[e] += g.T @ _dropped_out(rows_of_x[rows].to(dtype), rows, p, seed)
            if needs[0]:
                dx.index_add_(0, rows, _dropped_out(g @ A[e].to(dtype), rows, p, seed))
    dx = dx.to(dy.dtype).view(*dy.shape[:-1], K) if needs[0] else dx.to(dy.dtype)
    return dx, dA.to(A.dtype), dB.to(B.dtype)


def adapter_bounds(order: Tensor | None, offsets: Tensor | None, M: int) -> list[int]:
    """Where in `order` the rows of each adapter begin and end; DataError if in no order of M."""
    if order is None or offsets is None:
        return [0, M]
    rows = torch.arange(M, dtype=order.dtype, device=order.device)
    if not torch.equal(order.sort().values, rows):
        raise DataError(f"order: expected each of the M={M} rows of x once; see group_rows")
    bounds = offsets.tolist()
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] != M:
        raise DataError(
            f"offsets: expected ascending numbers that end with M={M}; got {bounds}; see group_rows"
        )
    return bounds


def _dropped_out(values: Tensor, rows: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """values / (1 - p) where kept, else 0: also where a dropped value is not finite."""
    if seed is None:
        return values
    mask = kept(rows, values.shape[1], p, seed)
    return torch.where(mask, values * (1 / (1 - p)), 0)


def _rows_of_adapters(
    M: int, K: int, order: Tensor | None, offsets: Tensor | None, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """(adapter, row numbers of x), a panel of rows at a time; rows of no adapter do not come."""
    if order is None:
        order = torch.arange(M, device=device)
    bounds = adapter_bounds(order, offsets, M)
    for e, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows = order[first:last].long()
        for some in panels(rows.numel(), K):
            yield e, rows[some]


def _decoded(
    weight: Tensor,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    K: int,
    block_size: int,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """Panels of rows of a weight in `dtype`, dense without a codebook and decoded with one."""
    if absmax is None or codebook is None:
        yield from cast(weight, dtype)
        return
    for rows, w in decode(weight, absmax, absmax_scale, codebook, K, block_size):
        yield rows, w.to(dtype)
