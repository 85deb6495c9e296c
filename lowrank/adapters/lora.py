"""LoRA: W + s·B A, A [R, K] and B [N, R] trained, W [N, K] frozen.   arXiv:2106.09685, §4.1.

The branch is two functions around the base layer, so that each direction touches x and y once:

    x, h = down(x, A)          h = x Aᵀ [M, R]                 backward: dx += dh A    dA = dhᵀ x
    y = base(x)                                                          dx  = dy W
    y = up(y, h, B, s)         y += s·h Bᵀ, in place           backward: dh = s·dy B   dB = s·dyᵀ h

Under torch.compile both are the plain products: the compiler plans the memory itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import WeightError


def scaling(r: int, alpha: float, rslora: bool = False) -> float:
    """s = alpha / R, or alpha / sqrt(R) when rank-stabilized.   rsLoRA, arXiv:2312.03732."""
    return alpha / math.sqrt(r) if rslora else alpha / r


@torch.no_grad()
def init_(A: Tensor, B: Tensor, how: bool | str = True) -> None:
    """Fill A [R, K] and B [N, R] in place.

    True: A ~ U(±1/sqrt(K)), B = 0, so that training starts at the base model.
    "gaussian": A ~ N(0, (1/R)²), B = 0.
    False: A as above and B ~ U(±1/sqrt(R)): not the base model; for tests.
    """
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # with a = sqrt(5) the bound is 1/sqrt(K)
    if how is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)


@torch.no_grad()
def merged_weight(
    weight: Tensor, branches: Iterable[tuple[Tensor, Tensor, float]], dtype: torch.dtype
) -> Tensor:
    """W + Σ s·B A over branches (A, B, s): a new [N, K] of `dtype`.

    Summed in at least float32 and rounded once.

    Raises WeightError if the result is not finite.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(wide, copy=True)
    for A, B, s in branches:
        merged.addmm_(B.to(wide), A.to(wide), alpha=s)
    merged = merged.to(dtype)
    if not merged.isfinite().all():
        raise WeightError(
            f"merged weight: expected finite values in {dtype}; got NaN or inf: damaged adapter?"
        )
    return merged


def down(x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (x, h = x Aᵀ [..., R]); the returned x is for the base layer and no other use.

    The gradient of that x is then base's dx, and dh A is added into it where it lies.
    h has autocast's dtype if autocast is on, else A's.
    """
    kind, dtype = x.device.type, A.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Down.apply(x, A, dtype)
    return x, F.linear(x.to(dtype), A.to(dtype))


def up(y: Tensor, h: Tensor, B: Tensor, s: float) -> Tensor:
    """y [..., N] + s·h Bᵀ in y's dtype, summed in the wider of the two, in place if that is y's.

    y must be the fresh output of a linear layer: nothing but this function may hold it.
    """
    if (
        torch.is_grad_enabled()
        and (h.requires_grad or B.requires_grad)
        and not torch.compiler.is_compiling()
    ):
        return _Up.apply(y, h, B, s)
    return _add_product(y, h, B.t(), s)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, A)
        ctx.set_materialize_grads(False)
        return x.view_as(x), F.linear(x.to(dtype), A.to(dtype))

    @staticmethod
    def backward(ctx, dx: Tensor | None, dh: Tensor | None):
        x, A = ctx.saved_tensors
        if dh is None:
            return dx, None, None
        dA = (
            (_rows(dh).t() @ _rows(x).to(dh.dtype)).to(A.dtype) if ctx.needs_input_grad[1] else None
        )
        if dx is None:  # with dropout the base layer took another x
            return (dh @ A.to(dh.dtype)).to(x.dtype), dA, None
        return _add_product(dx, dh, A, 1.0), dA, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, h: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(h, B)
        ctx.s = s
        # detached, not marked dirty: a custom operator's output may be a view, which autograd will
        # not have changed; the version counter is y's, so a base that had saved y is caught
        return _add_product(y.detach(), h, B.t(), s)

    @staticmethod
    def backward(ctx, dy: Tensor):
        h, B = ctx.saved_tensors
        dh = dB = None
        if ctx.needs_input_grad[1]:
            dh = ctx.s * (dy.to(h.dtype) @ B.to(h.dtype))
        if ctx.needs_input_grad[2]:  # (hᵀ dy)ᵀ: twice as fast as dyᵀ h on skinny h
            dB = (ctx.s * (_rows(h).t() @ _rows(dy).to(h.dtype))).t().to(B.dtype)
        return dy, dh, dB, None


def _add_product(y: Tensor, h: Tensor, W: Tensor, s: float) -> Tensor:
    """y [..., N] + s·h W, W [R, N], in y's dtype; y itself if it could be summed there."""
    wide = torch.promote_types(y.dtype, h.dtype)
    h, W = _rows(h).to(wide), W.to(wide)
    # grad mode is on when the compiler traces, or in a backward that will itself be differentiated
    if y.dtype == wide and y.is_contiguous() and not torch.is_grad_enabled():
        y.view(-1, y.shape[-1]).addmm_(h, W, alpha=s)
        return y
    return torch.addmm(_rows(y).to(wide), h, W, alpha=s).view(y.shape).to(y.dtype)


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]."""
    return x.reshape(-1, x.shape[-1])
