"""Lion over a moment of 8 bits."""

from __future__ import annotations

import ctypes
import itertools

import torch
from torch import Tensor

from lowrank.ops import adamw8bit, lion8bit, native

from .refusals import refuse_devices


def lion8bit_step(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    m_scale: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """A step of Lion in place; all tensors in one call of the library."""
    dense = [g.contiguous() for g in grads]  # held until the library returns
    tensors = native.moments8bit_tensors(params, dense, m, m_scale)
    by = native.Lion8bitCoefficients(*lion8bit.coefficients(lr, beta1, beta2, weight_decay))
    m_map = adamw8bit.dynamic_map(True)  # held too, as in adamw8bit_step
    status = native.load_cpu().lowrank_lion8bit_step(
        ctypes.addressof(tensors), len(params), m_map.data_ptr(), ctypes.addressof(by),
        torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "lion8bit_step")
    # Written through pointers: autograd must hear of it from us.
    torch.autograd.graph.increment_version((*params, *m, *m_scale))


def _refuse_lion8bit(*lists_and_numbers) -> str | None:
    lists = lists_and_numbers[:4]
    return adamw8bit.misfit(*lists) or refuse_devices(*itertools.chain(*lists))


REFUSALS = {"lion8bit_step": _refuse_lion8bit}
