"""Lion over a moment of 8 bits."""

from __future__ import annotations

from torch import Tensor

from lowrank.kernels import configs
from lowrank.kernels.lion8bit import lion8bit_kernel
from lowrank.ops.lion8bit import coefficients

from . import moments8bit


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
    """A step of Lion in place."""
    by = coefficients(lr, beta1, beta2, weight_decay)
    config = configs.lion8bit(len(params))
    moments8bit.launch_step(lion8bit_kernel, config, params, grads, (m, m, m_scale, m_scale), by)


def _refuse_lion8bit(*lists_and_numbers) -> str | None:
    return moments8bit.refuse(*lists_and_numbers[:4])


REFUSALS = {"lion8bit_step": _refuse_lion8bit}
