"""Norms, turns and gates by the native kernels: each one pass over its tensors, in float32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowrank.ops import native

from .panels import empty
from .refusals import refuse_devices, refuse_dtype

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # enum lowrank_activation


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x²) + eps) * weight, or (1 + weight), [..., H], and rstd [..., 1]."""
    x, weight, H = x.contiguous(), weight.contiguous(), x.shape[-1]
    y, rstd = torch.empty_like(x), empty(*x.shape[:-1], 1)
    status = native.load_cpu().lowrank_rms_norm(
        x.data_ptr(), native.DTYPES[x.dtype], rstd.numel(), H, weight.data_ptr(),
        native.DTYPES[weight.dtype], plus_one, eps, y.data_ptr(), rstd.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "rms_norm")
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, plus_one: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """dx [..., H] and dweight [H], [0] for what is not needed."""
    dy, x, weight, rstd = dy.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    H = x.shape[-1]
    dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
    dweight = empty(H if needs[1] else 0)
    status = native.load_cpu().lowrank_rms_norm_backward(
        dy.data_ptr(), x.data_ptr(), native.DTYPES[x.dtype], rstd.numel(), H, weight.data_ptr(),
        native.DTYPES[weight.dtype], plus_one, rstd.data_ptr(),
        dx.data_ptr() if needs[0] else None, dweight.data_ptr() if needs[1] else None,
        torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "rms_norm_backward")
    return dx, dweight.to(weight.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """q and k [B, S, heads, D], each pair turned by the angle of its position."""
    cos, sin = cos.contiguous(), sin.contiguous()
    angles = native.Angles(
        cos.data_ptr(), sin.data_ptr(), cos.shape[0], cos.shape[-1], native.DTYPES[cos.dtype]
    )
    by, threads = ctypes.byref(angles), torch.get_num_threads()
    turned = []
    for x in (q, k):
        x = x if x.stride(3) == 1 else x.contiguous()
        y = x.new_empty(x.shape)
        heads = native.Heads(x.data_ptr(), *x.shape, *x.stride()[:3])
        status = native.load_cpu().lowrank_rotate(
            ctypes.byref(heads), native.DTYPES[x.dtype], by, back, y.data_ptr(), threads
        )
        native.check(status, "rotate")
        turned.append(y)
    return turned[0], turned[1]


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, [..., I]."""
    gate, up = _rows(gate), _rows(up)
    y = gate.new_empty(gate.shape)
    status = native.load_cpu().lowrank_gated(
        ctypes.byref(_gate(gate, up, activation)), y.data_ptr(), torch.get_num_threads()
    )
    native.check(status, "gated")
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate and dup [..., I]."""
    dy, gate, up = dy.contiguous(), _rows(gate), _rows(up)
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    status = native.load_cpu().lowrank_gated_backward(
        ctypes.byref(_gate(gate, up, activation)), dy.data_ptr(), dgate.data_ptr(),
        dup.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "gated_backward")
    return dgate, dup


def _gate(gate: Tensor, up: Tensor, activation: str) -> native.Gate:
    I = gate.shape[-1]  # noqa: E741
    M = gate.numel() // I if I else 0
    return native.Gate(
        gate.data_ptr(), up.data_ptr(), M, I, _row_stride(gate), _row_stride(up),
        native.DTYPES[gate.dtype], _ACTIVATIONS[activation],
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """x [..., I], itself where its rows are equally far apart, as half of the columns has them."""
    return x if x.is_contiguous() or _row_stride(x) else x.contiguous()


def _row_stride(x: Tensor) -> int:
    """Elements from one row of x [..., I] to the next; 0 if that is not always the same."""
    if x.dim() < 2 or x.is_contiguous():
        return x.shape[-1]
    stride, expected = x.stride(), x.stride(-2)
    if stride[-1] != 1:
        return 0
    for size, step in zip(reversed(x.shape[:-1]), reversed(stride[:-1]), strict=True):
        if size != 1 and step != expected:
            return 0
        expected = step * size
    return stride[-2]


def _refuse_norm(x: Tensor, weight: Tensor, *others: object) -> str | None:
    if x.dim() < 1 or weight.shape != x.shape[-1:] or weight.numel() == 0:
        return "x and weight are not [..., H] and [H] with H >= 1"
    return refuse_dtype(x.dtype) or refuse_dtype(weight.dtype) or refuse_devices(x, weight)


def _refuse_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, plus_one: bool, needs: list[bool]
) -> str | None:
    if dy.shape != x.shape or dy.dtype != x.dtype or len(needs) != 2:
        return "dy is not as x"
    if rstd.shape != (*x.shape[:-1], 1) or rstd.dtype != torch.float32:
        return "rstd is not float32 [..., 1]"
    return _refuse_norm(x, weight) or refuse_devices(dy, rstd)


def _refuse_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> str | None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        return "q and k are not [B, S, heads, D]"
    (B, S, _, D), T = q.shape, cos.shape[-1] if cos.dim() else 0
    if cos.dim() != 4 or cos.shape[0] not in (1, B) or cos.shape[1:3] != (S, 1):
        return "cos is not [B or 1, S, 1, turned]"
    if T % 2 or T > D or sin.shape != (*cos.shape[:3], T // 2):
        return "sin is not [B or 1, S, 1, turned / 2]"
    if k.dtype != q.dtype or sin.dtype != cos.dtype:
        return "q and k, or cos and sin, are not of one dtype"
    return refuse_dtype(q.dtype) or refuse_dtype(cos.dtype) or refuse_devices(q, k, cos, sin)


def _refuse_gated(gate: Tensor, up: Tensor, activation: str) -> str | None:
    if activation not in _ACTIVATIONS:
        return f"has no {activation}"
    if gate.dim() < 1 or up.shape != gate.shape or up.dtype != gate.dtype:
        return "gate and up are not [..., I] of one dtype"
    return refuse_dtype(gate.dtype) or refuse_devices(gate, up)


def _refuse_gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> str | None:
    if dy.shape != gate.shape or dy.dtype != gate.dtype:
        return "dy is not as gate"
    return _refuse_gated(gate, up, activation) or refuse_devices(dy)


REFUSALS = {
    "rms_norm": _refuse_norm,
    "rms_norm_backward": _refuse_norm_backward,
    "rotate": _refuse_rotate,
    "gated": _refuse_gated,
    "gated_backward": _refuse_gated_backward,
}
