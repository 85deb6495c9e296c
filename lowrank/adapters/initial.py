"""What an adapter starts from: numbers of its own, or a part of the weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .config import LoRAConfig
from .loftq import loftq
from .olora import olora
from .pissa import pissa, qpissa


def split(
    config: LoRAConfig, weight: Tensor, quantizer: Any, r: int, scaling: float
) -> tuple[Any, Tensor, Tensor]:
    """(Q, A [R, K], B [N, R]), with Q + s·B A near `weight` [N, K], as `init_lora_weights` says.

    Q is a Storage of `quantizer`, or for None dense, but there is no LoftQ of that.
    """
    how, num_iter = str(config.init_lora_weights), config.loftq_config.get("loftq_iter", 1)
    if how == "loftq":
        return loftq(weight, quantizer, r, num_iter, scaling)
    if how == "olora":
        return olora(weight, quantizer, r, scaling)
    digits = how.removeprefix("pissa").removeprefix("_niter_")
    niter = int(digits) if digits else None
    if quantizer is None:
        return pissa(weight, r, niter, scaling)
    return qpissa(weight, quantizer, r, num_iter, niter, scaling)
