"""Norms, turns and gates as functions: check every argument, then call `torch.ops.lowrank`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.errors import ConfigError, DtypeError, ShapeError

from . import dispatch
from .checks import (
    ACTIVATIONS,
    check_device,
    check_dtype,
    check_number,
    check_tensors,
    shape_of,
    value_of,
)
from .reference import ACTIVATIONS as GATES


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight over the last dimension of x [..., H], weight [H].

    With `plus_one` the weight counts from 1: y = ... * (1 + weight), as Gemma has it. Computed in
    float32, y has x's dtype. Differentiable once in x and weight; keeps x and a number a row.
    Zhang & Sennrich, arXiv:1910.07467, eq. 4.
    """
    kernel = dispatch.straight("rms_norm", (x, weight, eps, plus_one), "ddfb")
    if kernel is not None:
        return kernel(x, weight, eps, plus_one)[0]
    _check_norm(x, weight, plus_one)
    check_number("eps", eps)
    return dispatch.call("rms_norm", x, weight, eps, plus_one)[0]


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    plus_one: bool = False,
    needs: Sequence[bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """(dx [..., H], dweight [H]) for dy [..., H]; what `needs` says is not needed is [0].

    `rstd` [..., 1] is the operator's second result: 1 / sqrt(mean(x²) + eps).
    """
    _check_norm(x, weight, plus_one)
    check_tensors(dy=dy, rstd=rstd)
    if dy.shape != x.shape:
        raise ShapeError(f"dy: expected {list(x.shape)}, as x; got {shape_of(dy)}")
    if rstd.shape != (*x.shape[:-1], 1):
        raise ShapeError(f"rstd: expected {[*x.shape[:-1], 1]}; got {shape_of(rstd)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor, dtype in (("dy", dy, x.dtype), ("rstd", rstd, wide)):
        check_dtype(name, tensor, (dtype,))
        check_device(name, tensor, x.device)
    if not isinstance(needs, list | tuple) or [type(need) for need in needs] != [bool] * 2:
        raise ConfigError(f"needs: expected two booleans, for dx and dweight; got {needs!r:.80}")
    return dispatch.call("rms_norm_backward", dy, x, weight, rstd, plus_one, list(needs))


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair (x[i], x[i + T/2]) of queries and keys by the angle of its position.

    q [B, S, heads, D] and k [B, S, its heads, D]; cos [B or 1, S, 1, T] holds each pair's twice,
    sin [B or 1, S, 1, T/2] once; what is beyond T <= D stays as it is:

    y[:T/2] = x[:T/2] cos - x[T/2:] sin,  y[T/2:] = x[T/2:] cos + x[:T/2] sin. Differentiable in q
    and k, keeping only cos and sin.   RoFormer, arXiv:2104.09864, eq. 34.
    """
    kernel = dispatch.straight("rotate", (q, k, cos, sin, False), "ddttb")
    if kernel is not None:
        return kernel(q, k, cos, sin, False)
    check_tensors(q=q, k=k, cos=cos, sin=sin)
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ShapeError(
            "q, k: expected [B, S, heads, D] of one B, S and D; "
            f"got {shape_of(q)} and {shape_of(k)}"
        )
    B, S, D = q.shape[0], q.shape[1], q.shape[3]
    T = cos.shape[-1] if cos.dim() == 4 else -1
    if T < 0 or T % 2 or T > D or cos.shape[0] not in (1, B) or cos.shape[1:3] != (S, 1):
        raise ShapeError(
            f"cos: expected [1 or {B}, {S}, 1, T] with T <= {D} even; got {shape_of(cos)}"
        )
    if sin.shape != (*cos.shape[:3], T // 2):
        raise ShapeError(f"sin: expected {[*cos.shape[:3], T // 2]}; got {shape_of(sin)}")
    check_dtype("q", q, ACTIVATIONS)
    check_dtype("k", k, (q.dtype,))
    check_dtype("cos", cos, ACTIVATIONS)
    check_dtype("sin", sin, (cos.dtype,))
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin)):
        check_device(name, tensor, q.device)
    if cos.requires_grad or sin.requires_grad:
        raise ConfigError(
            "cos, sin: expected constants, as no gradient is formed; got requires_grad; detach them"
        )
    return dispatch.call("rotate", q, k, cos, sin, False)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up for gate and up [..., I]; `activation` is silu, gelu or gelu_tanh.

    Differentiable once in both, keeping only them.   Shazeer, arXiv:2002.05202, eq. 6.
    """
    kernel = dispatch.straight("gated", (gate, up, activation), "dds")
    if kernel is not None:
        return kernel(gate, up, activation)
    _check_gate(gate, up, activation)
    return dispatch.call("gated", gate, up, activation)


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup) [..., I] for dy [..., I]: act'(gate) * up * dy and act(gate) * dy."""
    _check_gate(gate, up, activation)
    check_tensors(dy=dy)
    if dy.shape != gate.shape:
        raise ShapeError(f"dy: expected {list(gate.shape)}, as gate; got {shape_of(dy)}")
    check_dtype("dy", dy, (gate.dtype,))
    check_device("dy", dy, gate.device)
    return dispatch.call("gated_backward", dy, gate, up, activation)


def _check_norm(x: Tensor, weight: Tensor, plus_one: bool) -> None:
    check_tensors(x=x, weight=weight)
    if x.dim() == 0 or x.shape[-1] == 0 or weight.shape != x.shape[-1:]:
        raise ShapeError(
            "x, weight: expected [..., H] and [H] with H >= 1; "
            f"got {shape_of(x)} and {shape_of(weight)}"
        )
    check_dtype("x", x, ACTIVATIONS)
    check_dtype("weight", weight, ACTIVATIONS)
    check_device("weight", weight, x.device)
    if not isinstance(plus_one, bool):
        raise ConfigError(f"plus_one: expected True or False; got {value_of(plus_one)}")


def _check_gate(gate: Tensor, up: Tensor, activation: str) -> None:
    check_tensors(gate=gate, up=up)
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ShapeError(
            f"gate, up: expected [..., I], both alike; got {shape_of(gate)} and {shape_of(up)}"
        )
    check_dtype("gate", gate, ACTIVATIONS)
    if up.dtype != gate.dtype:
        raise DtypeError(f"up: expected the dtype of gate, {gate.dtype}; got {up.dtype}")
    check_device("up", up, gate.device)
    if not isinstance(activation, str) or activation not in GATES:
        raise ConfigError(
            f"activation: expected one of {', '.join(GATES)}; got {value_of(activation)}"
        )
