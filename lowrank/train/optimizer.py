"""The optimizers that `TrainConfig.optim` names, over the parameters that are to be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from lowrank.train.config import TrainConfig


class Optimizer(Protocol):
    """What the loop asks of an optimizer; those of torch.optim have it too."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...


class AdamW:
    """AdamW with decoupled weight decay, on matrices only (not on biases and norms).

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g²;  p = (1 - lr wd) p - lr m̂ / (√v̂ + eps)

    torch's fused kernel, without torch.optim.AdamW around it: making one of those imports the
    compiler, which costs time and memory at every start.   arXiv:1711.05101
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        self.betas, self.eps = betas, eps
        self.param_groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
        ]
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


def adamw_torch(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """AdamW as the config says."""
    betas = (config.adam_beta1, config.adam_beta2)
    return AdamW(parameters, config.learning_rate, betas, config.adam_epsilon, config.weight_decay)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], TrainConfig], Optimizer]] = {
    "adamw_torch": adamw_torch
}
