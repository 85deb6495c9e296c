"""The loss over held-out data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lowrank.train.feed import Feed
from lowrank.train.loss import BatchLoss
from lowrank.train.precision import Precision


class Evaluation:
    """Measures `model` over the batches of `feed`, in eval mode and without gradients."""

    def __init__(
        self, model: nn.Module, batch_loss: BatchLoss, feed: Feed, precision: Precision
    ) -> None:
        self._model, self._batch_loss = model, batch_loss
        self._feed, self._precision = feed, precision

    def loss(self, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Mean loss per labelled token; None if `stop` said so between two batches."""
        total = 0.0
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), self._precision.autocast():
                for batch in self._feed.in_order():
                    if stop():
                        return None
                    total += self._batch_loss(batch).item()
        finally:
            self._model.train(was_training)
        return total / sum(self._feed.data.labelled)
