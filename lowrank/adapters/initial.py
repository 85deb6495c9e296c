"""What an adapter starts from: numbers of its own, or a part of the weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .config import LoRAConfig
from .loftq import loftq
from .pissa import qpissa


def split(
    config: LoRAConfig, weight: Tensor, quantizer: Any, r: int, scaling: float
) -> tuple[Any, Tensor, Tensor]:
    """(Q, A [R, K], B [N, R]), with Q + s·B A near `weight` [N, K], as `init_lora_weights` says."""
    num_iter = config.loftq_config.get("loftq_iter", 1)
    if config.init_lora_weights == "loftq":
        return loftq(weight, quantizer, r, num_iter, scaling)
    digits = str(config.init_lora_weights).removeprefix("pissa").removeprefix("_niter_")
    return qpissa(weight, quantizer, r, num_iter, int(digits) if digits else None, scaling)
