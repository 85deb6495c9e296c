"""AdamW over moments of 8 bits."""

from __future__ import annotations

import ctypes
import itertools

import torch
from torch import Tensor

from lowrank.ops import adamw8bit, native

from .refusals import refuse_devices


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
    """Step number `step` of AdamW in place; all tensors in one call of the library."""
    dense = [g.contiguous() for g in grads]  # held until the library returns
    tensors = native.moments8bit_tensors(params, dense, m, m_scale, v, v_scale)
    by = native.Adamw8bitCoefficients(
        *adamw8bit.coefficients(lr, beta1, beta2, eps, weight_decay, step)
    )
    # held too: threads that are the first together may each have made maps of their own
    m_map, v_map = adamw8bit.dynamic_map(True), adamw8bit.dynamic_map(False)
    status = native.load_cpu().lowrank_adamw8bit_step(
        ctypes.addressof(tensors), len(params), m_map.data_ptr(), v_map.data_ptr(),
        ctypes.addressof(by), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "adamw8bit_step")
    # Written through pointers: autograd must hear of it from us.
    torch.autograd.graph.increment_version((*params, *m, *m_scale, *v, *v_scale))


def _refuse_adamw8bit(*lists_and_numbers) -> str | None:
    lists = lists_and_numbers[:6]
    return adamw8bit.misfit(*lists) or refuse_devices(*itertools.chain(*lists))


REFUSALS = {"adamw8bit_step": _refuse_adamw8bit}
