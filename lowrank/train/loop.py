"""The steps of a run, from where its history stands to the last."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from torch import nn

from lowrank.data import Batch
from lowrank.errors import TrainingError
from lowrank.train.best import Best
from lowrank.train.callbacks import Callback
from lowrank.train.config import TrainConfig
from lowrank.train.evaluation import Evaluation, is_due
from lowrank.train.feed import Feed
from lowrank.train.history import History
from lowrank.train.interrupt import Interrupt
from lowrank.train.loss import BatchLoss
from lowrank.train.precision import Precision
from lowrank.train.record import Record
from lowrank.train.relief import free_cached, make_room
from lowrank.train.remedies import is_out_of_memory
from lowrank.train.resume import Resumed
from lowrank.train.saving import Saver
from lowrank.train.update import Update


@dataclass
class Loop:
    """What a run consists of, and its steps.

    The loss of a step is the sum over the labelled tokens of all its batches, divided by their
    number: accumulation over unequal batches equals one large batch.
    """

    config: TrainConfig
    model: nn.Module
    batch_loss: BatchLoss
    feed: Feed
    precision: Precision
    update: Update
    history: History
    record: Record
    interrupt: Interrupt
    callbacks: Callback
    total_steps: int
    evaluation: Evaluation | None = None
    best: Best | None = None
    saver: Saver | None = None
    resumed: Resumed | None = None
    stopped: bool = False

    def run(self) -> None:
        """Take the steps, until the last, until stopped or until interrupted."""
        saved = self.history.steps
        if self.resumed is not None:
            self.resumed.restore(self)
        self.callbacks.on_train_begin(self)
        if self.resumed is not None:
            self.resumed.restore_rng()
        if self._evaluation_is_due():  # none is, in a run that goes on after one
            self._evaluate()
        while not self._is_over():
            self._step()
            if self._evaluation_is_due():
                self._evaluate()
            self.callbacks.on_step_end(self)
            if self.saver is not None:
                self.saver.check()
                if self._save_is_due():
                    self.saver.save(self)
                    saved = self.history.steps
        if self.saver is not None:
            if self.history.steps > saved:
                self.saver.save(self)
            self.saver.wait()
        if self.best is not None and self.best.restore():
            step, metric = self.history.best_step, self.history.best_metric
            self.record.say(f"what is kept is of step {step}, the best evaluation: {metric:.4f}")
        self.callbacks.on_train_end(self)

    def stop(self) -> None:
        """End the run after this step."""
        self.stopped = True

    def _step(self) -> None:
        """One optimizer step; a signal waits until it is whole."""
        start, step = time.perf_counter(), self.history.steps
        rate = self.update.set_rate(step)
        batches, losses, norm = self._measure()
        self.update.apply()
        seconds, loss = time.perf_counter() - start, sum(losses)
        self.history.add(batches, loss, seconds)
        self.record.step(batches, loss, norm, rate, seconds)

    def _measure(self) -> tuple[list[Batch], list[float], float]:
        """The batches of the step and what `_gradient` says of them, taken again until the scale of
        the loss is low enough and memory suffices.
        """
        while True:
            batches = self.feed.of_step(self.history.samples, self.history.batch_size)
            try:
                found = self._gradient(batches)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                halves = self.config.auto_find_batch_size
                done = make_room(self.update, self.history, self.feed, halves)
                if done is None:
                    raise
            else:
                if self._overflows(batches, *found):
                    continue
                return batches, *found
            # after the except block, which holds on to what was allocated
            free_cached()
            step = self.history.steps + 1
            self.record.say(f"step {step}: out of memory: {done}", logging.WARNING)

    def _gradient(self, batches: list[Batch]) -> tuple[list[float], float]:
        """The gradient of the step's mean loss in .grad; each batch's part of that loss, and the
        gradient's norm before clipping.
        """
        scale = 1.0 / sum(batch.labelled for batch in batches)
        losses = []
        for batch in batches:
            with self.precision.autocast():
                loss = self.batch_loss(batch) * scale
            self.update.backward(loss)
            losses.append(loss.detach())
        return self.update.measure(losses, first=not self.history.steps)

    def _overflows(self, batches: list[Batch], losses: list[float], norm: float) -> bool:
        """Whether the step is to be taken again with a smaller scale of the loss.

        TrainingError if that would not help: nothing has changed, and a checkpoint is as good.
        """
        if math.isfinite(norm) and all(map(math.isfinite, losses)):
            return False
        wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if not wrong and self.update.back_off():
            return True
        step, what = self.history.steps + 1, f"norm of the gradient is {norm}"
        if wrong:
            what = f"loss is {losses[wrong[0]]}"
            batches = [batches[i] for i in wrong]
        raise TrainingError(
            f"step {step}: the {what} in the batch of {self.feed.where(batches)}; the model stays "
            f"as step {step - 1} left it and nothing is saved: lower learning_rate, or look at "
            "data and weights"
        )

    def _is_over(self) -> bool:
        return self.history.steps >= self.total_steps or self.stopped or self.interrupt.requested

    def _evaluation_is_due(self) -> bool:
        return is_due(self.config, self.history, self.total_steps, len(self.feed.data))

    def _save_is_due(self) -> bool:
        if self.config.save_strategy == "epoch":
            return self.history.epoch_is_over(len(self.feed.data))
        return self.history.steps % self.config.save_steps == 0

    def _evaluate(self) -> None:
        """Record an evaluation, if there is held-out data and no interrupt, and judge it."""
        if self.evaluation is None:
            return
        found = self.evaluation.metrics(stop=lambda: self.interrupt.requested)
        if found is None:
            return
        steps = self.history.steps
        for name, value in found.items():
            if not math.isfinite(value):
                what = "held-out loss" if name == "eval_loss" else name
                raise TrainingError(
                    f"step {steps}: the {what} is {value}: look at data and weights"
                )
        self.history.evaluations.append({"step": steps, **found})
        self.record.evaluation()
        # as in transformers, a model that has not been trained is no candidate
        if self.best is not None and steps and self.best.look():
            without = self.history.evaluations_without_gain
            self.record.say(f"step {steps}: {without} evaluations without gain: the run ends here")
            self.stop()
        self.callbacks.on_evaluate(self)
