"""AdamW over moments of 8 bits."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from lowrank.ops import adamw8bit, native

from . import launch
from .refusals import refuse_devices, refuse_dtype


def adamw8bit_step(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    m_scale: list[Tensor],
    v: list[Tensor],
    v_scale: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Step number `step` of AdamW in place; up to 400 tensors in one launch."""
    if not params:
        return
    dense = [g.contiguous() for g in grads]  # held until the launch
    tensors = native.moments8bit_tensors(params, dense, m, m_scale, v, v_scale)
    by = native.Adamw8bitCoefficients(
        *adamw8bit.coefficients(lr, beta1, beta2, eps, weight_decay, step)
    )
    device = params[0].device
    launch.launch(
        "adamw8bit_step", device, ctypes.addressof(tensors), len(params),
        _map_on(device, True).data_ptr(), _map_on(device, False).data_ptr(), ctypes.addressof(by),
    )  # fmt: skip
    # Written through pointers: autograd must hear of it from us.
    torch.autograd.graph.increment_version((*params, *m, *m_scale, *v, *v_scale))


@cache
def _map_on(device: torch.device, signed: bool) -> Tensor:
    return adamw8bit.dynamic_map(signed).to(device)


def _refuse_adamw8bit(params, grads, m, m_scale, v, v_scale, *numbers) -> str | None:
    if len({len(tensors) for tensors in (params, grads, m, m_scale, v, v_scale)}) > 1:
        return "the lists are not of one length"
    for p, g, *state in zip(params, grads, m, v, m_scale, v_scale, strict=True):
        shape, scale_shape = p.shape, adamw8bit.scale_shape(p.shape)
        reason = refuse_devices(params[0], p, g, *state) or refuse_dtype(p.dtype)
        if reason is not None:
            return reason
        if g.shape != shape or g.dtype != p.dtype:
            return "a gradient has not the shape and dtype of its parameter"
        if any(t.shape != shape or t.dtype != torch.uint8 for t in state[:2]):
            return "the codes of a moment are not uint8 in the shape of the parameter"
        if any(t.shape != scale_shape or t.dtype != torch.float32 for t in state[2:]):
            return f"the scales of a moment are not float32 {list(scale_shape)}"
        if not (p.is_contiguous() and all(t.is_contiguous() for t in state)):
            return "a parameter or its state is not contiguous"
    return None


REFUSALS = {"adamw8bit_step": _refuse_adamw8bit}
