"""The decoder's elementwise mathematics, each keeping for the backward only what it must.

Composed from plain tensor operations, these three keep every intermediate product alive and walk
memory twice as often as needed; beside a frozen, quantized matmul that is a visible part of a step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * weight over the last dimension, x [..., H].

    The statistics are float32; y has x's dtype.   Zhang & Sennrich, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, keeping only its two arguments.   Shazeer, arXiv:2002.05202, eq. 6."""
    return _SwiGLU.apply(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x [B, S, heads, D] by the angle of its position.

    cos [B or 1, S, 1, D] holds each pair's twice, sin [B or 1, S, 1, D/2] once:

    y[:D/2] = x[:D/2] cos - x[D/2:] sin,  y[D/2:] = x[D/2:] cos + x[:D/2] sin. Keeps only cos and
    sin: the backward is the turn by the opposite angle.   RoFormer, arXiv:2104.09864, eq. 34.
    """
    return _Rotate.apply(x, cos, sin)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        mean_square = (
            torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        )
        rstd = mean_square.add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        # with n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g n))
        x, weight, rstd = ctx.saved_tensors
        x32, dy32 = x.float(), dy.float()
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy32 * x32).mul_(rstd).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = dy32 * weight
            dot = (g * x32).sum(-1, keepdim=True)  # [..., 1]
            slope = dot.mul_(rstd.pow(3)).div_(-x.shape[-1])
            dx = g.mul_(rstd).addcmul_(x32, slope).to(x.dtype)
        return dx, dweight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, F.silu(gate).mul_(dy)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    y = x * cos
    (a, b), (ya, yb) = x.chunk(2, -1), y.chunk(2, -1)
    ya.addcmul_(b, sin, value=-sign)
    yb.addcmul_(a, sin, value=sign)
    return y
