"""The optimizers that `TrainConfig.optim` names, over the parameters that are to be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import AdamW, Optimizer

if TYPE_CHECKING:
    from lowrank.train.config import TrainConfig


def adamw_torch(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """AdamW with decoupled weight decay, on matrices only.   arXiv:1711.05101

    Fused: over the 420 matrices of an r=16 adapter of SmolLM2-135M a step took 6.4 ms on two CPU
    cores, against 26.6 ms with foreach and 23.7 ms one by one (torch 2.13).
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], TrainConfig], Optimizer]] = {
    "adamw_torch": adamw_torch
}
