"""How a loss becomes an update: the optimizer, its schedule, fp16's scaler; all made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.train.config import TrainConfig
from lowrank.train.distributed import Ranks
from lowrank.train.gradients import check_gradients, clip
from lowrank.train.optimizer import OPTIMIZERS, parameter_groups
from lowrank.train.schedule import lr_multiplier, warmup_steps
from lowrank.train.state import optimizer_state, set_optimizer_state


class Update:
    """The optimizer of a run over `parameters` {name: parameter} of `model`, and its schedule.

    Of parameters that are sharded, each of the `ranks` has a part.

    The schedule is a function of the step alone, so what is to be kept is the state of `optimizer`
    and of `scaler`, which is None but for fp16.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        config: TrainConfig,
        total_steps: int,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self.parameters, self._config, self._total_steps = parameters, config, total_steps
        self._options = schedule_options(config)
        self._warmup = warmup_steps(total_steps, config.warmup_steps, config.warmup_ratio)
        groups = parameter_groups(model, parameters.values(), config)
        self.optimizer = OPTIMIZERS[config.optim](groups, config)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = None
        if config.fp16:
            device = next(iter(parameters.values())).device.type
            self.scaler = torch.amp.GradScaler(device)
        self.optimizer.zero_grad()  # a gradient that was there before is not this run's

    def set_rate(self, step: int) -> float:
        """Give every group its rate of step `step` (from 0); returns that of learning_rate."""
        name, total = self._config.lr_scheduler_type, self._total_steps
        multiplier = lr_multiplier(name, step, total, self._warmup, self._options)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * multiplier
        return self._config.learning_rate * multiplier

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to .grad, in fp16 times the scale that keeps it from 0."""
        loss = loss if self.scaler is None else self.scaler.scale(loss)
        loss.backward()

    def measure(self, losses: list[Tensor], first: bool) -> tuple[list[float], float]:
        """Clip the gradient; returns the losses of the batches, and the norm before clipping.

        On the `first` step, TrainingError if there is no gradient.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if first:
            check_gradients(self.parameters, self._ranks)
        norm = clip(self.parameters.values(), self._config.max_grad_norm, self._ranks)
        # the step's only wait for the device
        *values, norm_value = torch.stack([*losses, norm.to(losses[0])]).tolist()
        return values, norm_value

    def back_off(self) -> bool:
        """After a gradient that is not finite: halve the scale of the loss, for the step to be
        taken again; False where that is 1 already, or there is none.
        """
        if self.scaler is None or self.scaler.get_scale() <= 1.0:
            return False
        self.scaler.update()
        self.optimizer.zero_grad()
        return True

    def apply(self) -> None:
        """Change the parameters by the gradient that `measure` found finite."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """What later steps depend on, with the names of parameters."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"optimizer": optimizer_state(self.optimizer, self._names()), "scaler": scaler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave; it may have more."""
        set_optimizer_state(self.optimizer, self._names(), state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _names(self) -> dict[nn.Parameter, str]:
        return {p: name for name, p in self.parameters.items()}


def schedule_options(config: TrainConfig) -> dict[str, Any]:
    """The options of the schedule, its minimum as a multiplier."""
    options = dict(config.lr_scheduler_kwargs or {})
    if "min_lr" in options:
        options["min_lr_rate"] = options.pop("min_lr") / (config.learning_rate or 1.0)
    return options
