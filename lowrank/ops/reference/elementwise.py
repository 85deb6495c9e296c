"""What stands between a block's products: norms, turns of pairs by their positions, gates.

`rms_norm`, `rotate` and `gated` change nothing in place that a gradient needs: torch.compile traces
them, and makes their gradients and one kernel of them and their neighbours, for a device whose
backends have none of their own (`dispatch.call`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_gelu_tanh = partial(F.gelu, approximate="tanh")
_gelu_tanh_backward = partial(torch.ops.aten.gelu_backward, approximate="tanh")
# The function, and its gradient of (dy, x).   Hendrycks & Gimpel, arXiv:1606.08415.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_backward),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x²) + eps) * weight, x [..., H], or (1 + weight); and the root's inverse.

    In float32 (float64 if x is); y has x's dtype, rstd [..., 1] is wide.   Zhang & Sennrich,
    arXiv:1910.07467, eq. 4.
    """
    wide = _widened(x)
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    rstd = (mean_square + eps).rsqrt()
    y = wide * rstd * _effective(weight, wide, plus_one)
    return y.to(x.dtype).contiguous(), rstd.contiguous()


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, plus_one: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """With n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g n)), dweight = Σ dy n."""
    wide, dy = _widened(x), _widened(dy)
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if needs[1]:
        products = (dy * wide).mul_(rstd)
        dweight = products.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    if needs[0]:
        g = dy * _effective(weight, wide, plus_one)
        dot = (g * wide).sum(-1, keepdim=True)  # [..., 1]
        slope = dot.mul_(rstd.pow(3)).div_(-x.shape[-1])
        dx = g.mul_(rstd).addcmul_(wide, slope).to(x.dtype).contiguous()
    return dx, dweight


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Turn each pair (x[i], x[i + T/2]) of q and k by the angle of its position; the rest stays.

    y[:T/2] = x[:T/2] cos - x[T/2:] sin,  y[T/2:] = x[T/2:] cos + x[:T/2] sin, or, `back`, by the
    opposite angle, which is the gradient.   RoFormer, arXiv:2104.09864, eq. 34.
    """
    sign = -1 if back else 1
    return _turned(q, cos, sin, sign), _turned(k, cos, sin, sign)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up.   Shazeer, arXiv:2002.05202, eq. 6."""
    return (ACTIVATIONS[activation][0](gate) * up).contiguous()


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate = act'(gate) * up * dy, dup = act(gate) * dy."""
    act, act_backward = ACTIVATIONS[activation]
    return act_backward(dy * up, gate).contiguous(), act(gate).mul_(dy).contiguous()


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _effective(weight: Tensor, wide: Tensor, plus_one: bool) -> Tensor:
    weight = weight.to(wide.dtype)
    return 1 + weight if plus_one else weight


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned = cos.shape[-1]
    a, b = x[..., :turned].chunk(2, -1)
    cos_a, cos_b = cos.chunk(2, -1)
    ya = torch.addcmul(a * cos_a, b, sin, value=-sign)
    yb = torch.addcmul(b * cos_b, a, sin, value=sign)
    return torch.cat((ya, yb, x[..., turned:]), -1).contiguous()
