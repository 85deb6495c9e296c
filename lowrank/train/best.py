"""The best evaluation of a run: what was trained by then is kept, and too long without is the end.

As transformers' load_best_model_at_end and EarlyStoppingCallback count it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError
from lowrank.optim.shards import cut, local, sharded
from lowrank.train.config import TrainConfig
from lowrank.train.history import History


class Best:
    """Watches the metric `config.metric_for_best_model` in the evaluations of a `history`.

    With load_best_model_at_end it keeps a copy of `parameters` {name: parameter} in main memory, of
    sharded ones of this rank's part.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, history: History
    ) -> None:
        self._parameters, self._config, self._history = parameters, config, history
        self._metric = metric_name(config)
        self._greater = config.greater_is_better
        if self._greater is None:
            self._greater = not self._metric.endswith("loss")
        self._kept: dict[str, Tensor] = {}

    def check(self) -> None:
        """ConfigError if an evaluation does not have what is to be compared."""
        check_metric(self._config, self._history.evaluations[-1].keys() - {"step"})

    def look(self) -> bool:
        """Judge the last evaluation; whether the run is to end, for want of a better one."""
        history, config = self._history, self._config
        evaluation = history.evaluations[-1]
        value, best = evaluation[self._metric], history.best_metric
        gain = math.inf if best is None else value - best if self._greater else best - value
        if gain > config.early_stopping_threshold:
            history.evaluations_without_gain = 0
        else:
            history.evaluations_without_gain += 1
        if gain > 0:
            history.best_metric, history.best_step = value, history.steps
            if config.load_best_model_at_end:
                self._kept = {
                    name: local(p).detach().to("cpu", copy=True)
                    for name, p in self._parameters.items()
                }
        patience = config.early_stopping_patience
        return patience is not None and history.evaluations_without_gain >= patience

    def restore(self) -> bool:
        """Give the parameters the values they had at the best evaluation; False: none are kept."""
        with torch.no_grad():
            for name, value in self._kept.items():
                local(self._parameters[name]).copy_(value)
        return bool(self._kept)

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, by name; the rest is in the history."""
        places = self._parameters
        return {n: sharded(v, tuple(places[n].shape), places[n]) for n, v in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Keep what `state_dict` gave."""
        self._kept = {n: local(cut(v, self._parameters[n])) for n, v in state.items()}


def check_metric(config: TrainConfig, found: Iterable[str]) -> None:
    """ConfigError if `found`, the names in an evaluation, lacks config.metric_for_best_model."""
    if metric_name(config) not in found:
        raise ConfigError(
            f"metric_for_best_model is {config.metric_for_best_model!r}, but an evaluation has "
            f"{', '.join(sorted(found))}: name one of them, or return it from compute_metrics"
        )


def metric_name(config: TrainConfig) -> str:
    """What an evaluation calls the metric that is compared."""
    return "eval_" + config.metric_for_best_model.removeprefix("eval_")
