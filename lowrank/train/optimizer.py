"""The optimizers that `TrainConfig.optim` names, over the parameters that are to be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lowrank.surgery import lora_plus_groups

if TYPE_CHECKING:
    from lowrank.train.config import TrainConfig


class Optimizer(Protocol):
    """What the loop asks of an optimizer; those of torch.optim have it too."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...


class AdamW:
    """AdamW with decoupled weight decay, over groups of parameters.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g²;  p = (1 - lr wd) p - lr m̂ / (√v̂ + eps)

    torch's fused kernel, without torch.optim.AdamW around it: making one of those imports the
    compiler, which costs time and memory at every start.   arXiv:1711.05101
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        self.betas, self.eps = betas, eps
        self.param_groups = [dict(group) for group in groups]  # params, lr, weight_decay
        self.state: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}  # m, v, steps taken

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in parameters]
            adamw(
                parameters,
                [p.grad for p in parameters],
                [m for m, _, _ in states],
                [v for _, v, _ in states],
                [],
                [steps for _, _, steps in states],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                maximize=False,
            )

    def zero_grad(self) -> None:
        """Free the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _state_of(self, p: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        if p not in self.state:
            steps = torch.zeros((), dtype=torch.float32, device=p.device)
            self.state[p] = (torch.zeros_like(p), torch.zeros_like(p), steps)
        return self.state[p]


def adamw_torch(groups: Iterable[dict[str, Any]], config: TrainConfig) -> Optimizer:
    """AdamW as the config says."""
    return AdamW(groups, (config.adam_beta1, config.adam_beta2), config.adam_epsilon)


OPTIMIZERS: dict[str, Callable[[Iterable[dict[str, Any]], TrainConfig], Optimizer]] = {
    "adamw_torch": adamw_torch
}


def parameter_groups(
    model: nn.Module, parameters: Iterable[nn.Parameter], config: TrainConfig
) -> list[dict[str, Any]]:
    """The `parameters` of the model that train, with the rates and the decay of the config."""
    lr, decay = config.learning_rate, config.weight_decay
    if config.loraplus_lr_ratio is not None:
        ratio, lr_embedding = config.loraplus_lr_ratio, config.loraplus_lr_embedding
        return lora_plus_groups(model, lr, ratio, lr_embedding, decay)
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
