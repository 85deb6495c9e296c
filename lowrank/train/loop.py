"""The steps of a run, from where its history stands to the last."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.data import Batch
from lowrank.errors import TrainingError
from lowrank.train.best import Best
from lowrank.train.callbacks import Callback
from lowrank.train.config import TrainConfig
from lowrank.train.distributed import Ranks
from lowrank.train.evaluation import Evaluation, is_due
from lowrank.train.feed import Counts, Feed
from lowrank.train.history import History
from lowrank.train.interrupt import Interrupt
from lowrank.train.loss import BatchLoss
from lowrank.train.precision import Precision
from lowrank.train.record import Record
from lowrank.train.relief import free_cached, make_room
from lowrank.train.remedies import is_out_of_memory
from lowrank.train.resume import Resumed
from lowrank.train.saving import Saver
from lowrank.train.schedule import whole_steps
from lowrank.train.update import Update


@dataclass
class Loop:
    """What a run consists of, and its steps.

    The loss of a step is the sum over the labelled tokens of all its batches, on all `ranks`,
    divided by their number: accumulation over unequal batches equals one large batch.
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
    ranks: Ranks
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
            self.resumed.restore_rng(self.ranks.rank)
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
        counts = self.feed.counts(self.history.samples)
        loss, norm = self._measure(counts)
        self.update.apply()
        seconds = time.perf_counter() - start
        self.history.add(counts, loss, seconds)
        self.record.step(counts, loss, norm, rate, seconds)

    def _measure(self, counts: Counts) -> tuple[float, float]:
        """Put the gradient of the step's mean loss into .grad, clipped; that loss, and the norm of
        the gradient before. Taken again until the scale of the loss is low enough and memory
        suffices.
        """
        while True:
            batches = self.feed.of_step(self.history.samples, self.history.batch_size)
            try:
                parts = self._backward(batches, counts)
            except (MemoryError, RuntimeError) as error:
                # of what is sharded, the others wait for this very batch
                if self.feed.in_step or not is_out_of_memory(error):
                    raise
                halves = self.config.auto_find_batch_size
                done = make_room(self.update, self.history, self.feed, halves)
                if done is None:
                    raise
            else:
                if not self.feed.in_step:  # else they were in the backward
                    self.ranks.sum_gradients(self.update.parameters.values())
                losses, norm = self.update.measure(parts, first=not self.history.steps)
                (loss,) = self.ranks.sum([sum(losses)])
                if self._overflows(batches, losses, loss, norm):
                    continue
                return loss, norm
            # after the except block, which holds on to what was allocated
            free_cached()
            step = self.history.steps + 1
            self.record.say(f"step {step}: out of memory: {done}", logging.WARNING)

    def _backward(self, batches: list[Batch], counts: Counts) -> list[Tensor]:
        """Add the gradients of these batches to .grad; each one's part of the step's mean loss."""
        scale, losses = 1.0 / counts.labelled, []
        for batch in batches:
            with self.precision.autocast():
                loss = self.batch_loss(batch) * scale
            self.update.backward(loss)
            losses.append(loss.detach())
        for batch in self.feed.idle_of_step(self.history.samples, self.history.batch_size):
            with self.precision.autocast():
                loss = self.batch_loss(batch) * 0.0
            self.update.backward(loss)
        # a rank may have no row of the last step of an epoch
        return losses or [torch.zeros((), device=self.feed.device)]

    def _overflows(
        self, batches: list[Batch], losses: list[float], total: float, norm: float
    ) -> bool:
        """Whether the step is to be taken again with a smaller scale of the loss.

        TrainingError if that would not help: nothing has changed, and a checkpoint is as good.
        """
        if math.isfinite(norm) and math.isfinite(total):
            return False
        if math.isfinite(total) and self.update.back_off():
            return True
        step, what = self.history.steps + 1, f"norm of the gradient is {norm}"
        wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if wrong:
            what = f"loss is {losses[wrong[0]]}"
            batches = [batches[i] for i in wrong]
        found = f"{what} in the batch of {self.feed.where(batches)}"
        # of all ranks, that which has the batch knows it
        everywhere = self.ranks.exchange((bool(wrong), found))
        _, found = next((of_rank for of_rank in everywhere if of_rank[0]), everywhere[0])
        raise self.ranks.known(
            TrainingError(
                f"step {step}: the {found}; the model stays as step {step - 1} left it and nothing "
                "is saved: lower learning_rate, or look at data and weights"
            )
        )

    def _is_over(self) -> bool:
        """Whether no step is to come; what one rank wants, all do."""
        self.stopped, interrupted = self.ranks.any(self.stopped, self.interrupt.requested)
        if interrupted:  # not an assignment: a signal may have come since
            self.interrupt.requested = True
        return self.history.steps >= self.total_steps or self.stopped or interrupted

    def _evaluation_is_due(self) -> bool:
        return is_due(self.config, self.history, self.total_steps, len(self.feed.data))

    def _save_is_due(self) -> bool:
        if self.config.save_strategy == "epoch":
            return self.history.epoch_is_over(len(self.feed.data))
        return self.history.steps % whole_steps(self.config.save_steps, self.total_steps) == 0

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
        if self.best is not None:
            self.best.check()
        # as in transformers, a model that has not been trained is no candidate
        if self.best is not None and steps and self.best.look():
            without = self.history.evaluations_without_gain
            self.record.say(f"step {steps}: {without} evaluations without gain: the run ends here")
            self.stop()
        self.callbacks.on_evaluate(self)
