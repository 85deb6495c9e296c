"""AdamW over moments of 8 bits."""

from __future__ import annotations

from torch import Tensor

from lowrank.kernels import configs
from lowrank.kernels.adamw8bit import adamw8bit_kernel
from lowrank.ops.adamw8bit import coefficients

from . import moments8bit


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
    """Step number `step` of AdamW in place."""
    by = coefficients(lr, beta1, beta2, eps, weight_decay, step)
    config = configs.adamw8bit(len(params))
    moments8bit.launch_step(adamw8bit_kernel, config, params, grads, (m, v, m_scale, v_scale), by)


def _refuse_adamw8bit(*lists_and_numbers) -> str | None:
    return moments8bit.refuse(*lists_and_numbers[:6])


REFUSALS = {"adamw8bit_step": _refuse_adamw8bit}
