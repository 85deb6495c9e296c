"""How gradients become an update: the optimizer, its schedule, clipping; all made here."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import TrainingError
from lowrank.train.config import TrainConfig
from lowrank.train.gradients import check_gradients, clip
from lowrank.train.optimizer import OPTIMIZERS, parameter_groups
from lowrank.train.schedule import lr_multiplier, warmup_steps


class Update:
    """The optimizer of a run over `parameters` {name: parameter} of `model`, and its schedule.

    The schedule is a function of the step alone, so what is to be kept is the optimizer's state.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        config: TrainConfig,
        total_steps: int,
    ) -> None:
        self._parameters, self._config, self._total_steps = parameters, config, total_steps
        self._options = schedule_options(config)
        self._warmup = warmup_steps(total_steps, config.warmup_steps, config.warmup_ratio)
        groups = parameter_groups(model, parameters.values(), config)
        self.optimizer = OPTIMIZERS[config.optim](groups, config)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.zero_grad()  # a gradient that was there before is not this run's

    def set_rate(self, step: int) -> float:
        """Give every group its rate of step `step` (from 0); returns that of learning_rate."""
        name, total = self._config.lr_scheduler_type, self._total_steps
        multiplier = lr_multiplier(name, step, total, self._warmup, self._options)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * multiplier
        return self._config.learning_rate * multiplier

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to .grad."""
        loss.backward()

    def apply(self, loss: Tensor, step: int) -> tuple[float, float]:
        """Clip, then take step `step` (from 1); returns the loss and the norm before clipping.

        TrainingError if one of them is not finite; no parameter has changed then.
        """
        if step == 1:
            check_gradients(self._parameters)
        norm = clip(self._parameters.values(), self._config.max_grad_norm)
        # the step's only wait for the device
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        for what, value in (("loss", loss_value), ("norm of the gradient", norm_value)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {step}: the {what} is {value}; the model stays as step {step - 1} left "
                    "it and nothing is saved: lower learning_rate, or look at data and weights"
                )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss_value, norm_value


def schedule_options(config: TrainConfig) -> dict[str, Any]:
    """The options of the schedule, its minimum as a multiplier."""
    options = dict(config.lr_scheduler_kwargs or {})
    if "min_lr" in options:
        options["min_lr_rate"] = options.pop("min_lr") / (config.learning_rate or 1.0)
    return options
