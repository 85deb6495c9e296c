"""The decoder's elementwise mathematics, each keeping for the backward only what it must.

Composed from plain tensor operations, norms, gates and rotations keep every intermediate product
alive and walk memory twice as often as needed; beside a frozen, quantized matmul that is a visible
part of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_gelu_tanh = partial(F.gelu, approximate="tanh")
_gelu_tanh_backward = partial(torch.ops.aten.gelu_backward, approximate="tanh")
# By the names of config.json: the function, and its gradient of (dy, x). Three names are GELU by
# the hyperbolic tangent, written down by three people.   Hendrycks & Gimpel, arXiv:1606.08415.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), (_gelu_tanh, _gelu_tanh_backward)
    ),
}


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * weight over the last dimension, x [..., H].

    The statistics are float32; y has x's dtype.   Zhang & Sennrich, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class RMSNormPlusOne(RMSNorm):
    """y = x / sqrt(mean(x²) + eps) * (1 + weight), the product in float32: Gemma's."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, 1 + self.weight.float(), self.eps)


def activate(activation: str, x: Tensor) -> Tensor:
    """The activation of that name, one of ACTIVATIONS."""
    return ACTIVATIONS[activation][0](x)


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, keeping only its two arguments.   Shazeer, arXiv:2002.05202, eq. 6."""
    if not torch.is_grad_enabled():  # a Function takes longer than a token's gate
        return activate(activation, gate).mul_(up)
    return _Gated.apply(activation, gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x [B, S, heads, D] by the angle of its position.

    cos [B or 1, S, 1, D] holds each pair's twice, sin [B or 1, S, 1, D/2] once; where they are of
    fewer dimensions than x, the rest of x stays as it is:

    y[:D/2] = x[:D/2] cos - x[D/2:] sin,  y[D/2:] = x[D/2:] cos + x[:D/2] sin. Keeps only cos and
    sin: the backward is the turn by the opposite angle.   RoFormer, arXiv:2104.09864, eq. 34.
    """
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return _normed(x, weight, eps)[0]


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and 1 / sqrt(mean(x²) + eps) [..., 1]."""
    x32 = x.float()
    mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    rstd = mean_square.add_(eps).rsqrt_()
    return (x32 * rstd).to(weight.dtype).mul_(weight).to(x.dtype), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

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


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation: str, gate: Tensor, up: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return ACTIVATIONS[activation][0](gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        act, act_backward = ACTIVATIONS[ctx.activation]
        return None, act_backward(dy * up, gate), act(gate).mul_(dy)


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
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat([_turn(x[..., :turned], cos, sin, sign), x[..., turned:]], dim=-1)
    y = x * cos
    (a, b), (ya, yb) = x.chunk(2, -1), y.chunk(2, -1)
    ya.addcmul_(b, sin, value=-sign)
    yb.addcmul_(a, sin, value=sign)
    return y
