"""What is measured between steps: the loss over held-out data, and metrics of the user's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import nn

from lowrank.data import TokenizedExamples
from lowrank.errors import ConfigError
from lowrank.train.config import TrainConfig
from lowrank.train.distributed import Ranks
from lowrank.train.feed import Feed
from lowrank.train.history import History
from lowrank.train.loss import BatchLoss
from lowrank.train.precision import Precision
from lowrank.train.relief import free_cached
from lowrank.train.remedies import is_out_of_memory
from lowrank.train.schedule import whole_steps
from lowrank.train.sharding import rest

logger = logging.getLogger("lowrank.train")

# the model, in eval mode -> {name: number}
ComputeMetrics = Callable[[nn.Module], Mapping[str, float]]


class Evaluation:
    """Measures `model` over the batches of `feed`, in eval mode, without gradients.

    The random numbers to come are the same as without it. If it `halves`, batches become smaller
    where memory does not suffice. The `ranks` share the examples and find the same loss; of the
    metrics those count that the first has computed.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_loss: BatchLoss,
        feed: Feed,
        precision: Precision,
        compute_metrics: ComputeMetrics | None = None,
        halves: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._model, self._batch_loss = model, batch_loss
        self.feed, self._precision, self._ranks = feed, precision, ranks
        self._compute_metrics = compute_metrics
        self._size, self._halves = feed.sampler.batch_size, halves

    def metrics(self, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """eval_loss, the mean per labelled token, and what compute_metrics returns, as eval_NAME.

        None if `stop` said so between two batches.
        """
        devices = [self.feed.device] if self.feed.device.type == "cuda" else []
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                loss = self._loss(stop)
                return None if loss is None else {"eval_loss": loss, **self._computed()}
        finally:
            self._model.train(was_training)
            rest(self._model)

    def _loss(self, stop: Callable[[], bool]) -> float | None:
        while True:
            try:
                return self._mean(stop)
            except (MemoryError, RuntimeError) as error:
                if not self._halves or self._size == 1 or not is_out_of_memory(error):
                    raise
            # after the except block, which holds on to what was allocated
            self._size //= 2
            free_cached()
            logger.warning("out of memory: evaluating in batches of %d from here on", self._size)

    def _mean(self, stop: Callable[[], bool]) -> float | None:
        total, stopped = 0.0, False
        for batch in self.feed.in_order(self._size):
            stopped = stop()
            if self.feed.in_step and self._ranks is not None:
                (stopped,) = self._ranks.any(stopped)
            if stopped:
                break
            with self._precision.autocast():
                total += self._batch_loss(batch).item()
        for batch in [] if stopped else self.feed.idle_in_order(self._size):
            if self._ranks is not None and self._ranks.any(stop())[0]:
                stopped = True
                break
            with self._precision.autocast():
                self._batch_loss(batch)
        if self._ranks is not None:
            total, stopped = self._ranks.sum([total, stopped])
        return None if stopped else total / sum(self.feed.data.labelled)

    def _computed(self) -> dict[str, float]:
        if self._compute_metrics is None:
            return {}
        found = self._compute_metrics(self._model)
        if self._ranks is not None:
            found = self._ranks.exchange(found)[0]
        try:
            return {"eval_" + k.removeprefix("eval_"): float(v) for k, v in found.items()}
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(
                f"compute_metrics must return a dict of names and numbers; got {found!r}"
            ) from None


def is_due(config: TrainConfig, history: History, total_steps: int, examples: int) -> bool:
    """Before the first step, after the last, and when the config says; unless it is done."""
    steps = history.steps
    if any(found["step"] == steps for found in history.evaluations[-1:]):
        return False
    if steps in (0, total_steps):
        return True
    if config.evaluates_by == "epoch":
        return history.epoch_is_over(examples)
    every = whole_steps(config.eval_steps or config.logging_steps, total_steps)
    return config.evaluates_by == "steps" and steps % every == 0


def check_evaluated(
    config: TrainConfig,
    eval_data: TokenizedExamples | None,
    compute_metrics: ComputeMetrics | None,
) -> None:
    """ConfigError for settings or metrics that need held-out data, if there is none."""
    asked = {
        "compute_metrics": compute_metrics is not None,
        "load_best_model_at_end": config.load_best_model_at_end,
        "early_stopping_patience": config.early_stopping_patience,
        "eval_strategy": config.evaluates_by in ("steps", "epoch"),
    }
    for name, is_asked in asked.items():
        if is_asked and eval_data is None:
            raise ConfigError(f"{name} needs held-out data; got none: pass eval_data")
