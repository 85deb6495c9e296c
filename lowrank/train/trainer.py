"""The training loop, for any module that predicts the next token."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.data import (
    Batch,
    TokenizedExamples,
    collate,
    load_examples,
    step_batches,
    steps_per_epoch,
    tokenize_all,
)
from lowrank.data.tokens import Tokenizer
from lowrank.errors import ConfigError, TrainingError
from lowrank.io.versions import versions
from lowrank.surgery.checkpointing import can_checkpoint
from lowrank.train.config import TrainConfig
from lowrank.train.gradients import (
    check_gradients,
    check_values,
    clip,
    gradient_checkpointing,
    trainable_parameters,
)
from lowrank.train.interrupt import Interrupt
from lowrank.train.loss import batch_loss, packs
from lowrank.train.optimizer import OPTIMIZERS, Optimizer, parameter_groups
from lowrank.train.record import Record, TrainResult
from lowrank.train.run import CONFIG, RESULTS, RunDirectory, check_output_dir
from lowrank.train.schedule import lr_multiplier, warmup_steps

logger = logging.getLogger("lowrank.train")

Data = str | Path | Sequence[Mapping[str, Any]] | TokenizedExamples


class Trainer:
    """Trains the parameters of `model` that require a gradient, on next-token prediction.

    The loss of a step is the sum over the labelled tokens of all its micro-batches, divided by
    their number: accumulation over unequal batches equals one large batch. `train_data` and
    `eval_data`: a path, a sequence of dicts (see `lowrank.data.load_examples`), or what
    `lowrank.data.tokenize_all` returned. The model is called as `lowrank.train.loss` says.
    Raises ConfigError or DataError for all that can be known before the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_data: Data,
        eval_data: Data | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_output_dir(config.output_dir, config.overwrite_output_dir)
        if config.gradient_checkpointing and not can_checkpoint(model):
            raise ConfigError(
                f"gradient_checkpointing is on, but {type(model).__name__} has no attribute "
                "of that name to set: turn it off, or give the model one"
            )
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.parameters = trainable_parameters(model)
        self.device = next(iter(self.parameters.values())).device
        self.train_data = self._tokenize(train_data, "training")
        self.eval_data = None if eval_data is None else self._tokenize(eval_data, "held-out")
        self.total_steps = config.max_steps
        if config.max_steps < 0:
            samples = config.per_device_train_batch_size * config.gradient_accumulation_steps
            an_epoch = steps_per_epoch(len(self.train_data), samples)
            self.total_steps = math.ceil(config.num_train_epochs * an_epoch)
        self._packed = config.padding_free and packs(model)
        self._loss = batch_loss(model)

    def train(self) -> TrainResult:
        """Run all steps, evaluating before and after; save; return losses and metrics.

        Ctrl-C ends the run after the last whole step: what was trained by then is saved, and the
        result says `interrupted`. A loss or gradient that is not finite is a TrainingError, and
        nothing is saved.
        """
        config = self.config
        torch.manual_seed(config.seed)
        was_training = self.model.training
        run = RunDirectory(config.output_dir, config.overwrite_output_dir)
        try:
            run.write_json(CONFIG, self._resolved())
            with Interrupt() as interrupt:
                self.model.train()
                with gradient_checkpointing(self.model, config.gradient_checkpointing):
                    result = self._run(run, interrupt)
                self._save(run, result)
        finally:
            run.close()
            self.model.train(was_training)
            self.model.zero_grad(set_to_none=True)
        return result

    def evaluate(self) -> float:
        """Mean loss per labelled token of eval_data, in eval mode."""
        if self.eval_data is None:
            raise ConfigError("evaluate() needs held-out data; got none: pass Trainer(eval_data=)")
        loss = self._held_out_loss(self.eval_data, stop=lambda: False)
        assert loss is not None
        return loss

    def _run(self, run: RunDirectory, interrupt: Interrupt) -> TrainResult:
        """Take the steps, until the last or until interrupted."""
        config, total = self.config, self.total_steps
        groups = parameter_groups(self.model, self.parameters.values(), config)
        optimizer = OPTIMIZERS[config.optim](groups, config)
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.zero_grad()  # a gradient that was there before is not this run's
        warmup = warmup_steps(total, config.warmup_steps, config.warmup_ratio)
        record = Record(run, total, len(self.train_data), config.logging_steps, config.disable_tqdm)
        try:
            self._evaluate(record, interrupt)
            for step in range(total):
                start = time.perf_counter()
                multiplier = lr_multiplier(config.lr_scheduler_type, step, total, warmup)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * multiplier
                batches = self._step_batches(record.samples)
                loss = self._backward(batches, interrupt)
                if loss is None:
                    break
                loss_value, norm = self._update(optimizer, loss, record)
                seconds = time.perf_counter() - start
                record.step(batches, loss_value, norm, config.learning_rate * multiplier, seconds)
                due = config.eval_steps and (step + 1) % config.eval_steps == 0
                if due or step + 1 == total:
                    self._evaluate(record, interrupt)
        finally:
            record.close()
        return record.result(self.parameters.values(), self.device, interrupt.requested)

    def _backward(self, batches: list[Batch], interrupt: Interrupt) -> Tensor | None:
        """Add the gradient of the step's mean loss to .grad, return the loss; None: interrupted."""
        scale = 1.0 / sum(batch.labelled for batch in batches)
        total = None
        for batch in batches:
            if interrupt.requested:
                return None
            with self._autocast():
                loss = self._loss(batch) * scale
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        return total

    def _update(self, optimizer: Optimizer, loss: Tensor, record: Record) -> tuple[float, float]:
        """Clip and step; returns the loss and the gradient's norm before clipping."""
        step = record.steps + 1
        if step == 1:
            check_gradients(self.parameters)
        norm = clip(self.parameters.values(), self.config.max_grad_norm)
        # the step's only wait for the device
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        for what, value in (("loss", loss_value), ("norm of the gradient", norm_value)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {step}: the {what} is {value}; the model stays as step {step - 1} left "
                    "it and nothing is saved: lower learning_rate, or look at data and weights"
                )
        optimizer.step()
        optimizer.zero_grad()
        return loss_value, norm_value

    def _evaluate(self, record: Record, interrupt: Interrupt) -> None:
        """Record the held-out loss, if there is such data and no interrupt."""
        if self.eval_data is None:
            return
        loss = self._held_out_loss(self.eval_data, stop=lambda: interrupt.requested)
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {record.steps}: the held-out loss is {loss}: look at data and weights"
            )
        record.evaluation(loss)

    def _held_out_loss(self, data: TokenizedExamples, stop: Callable[[], bool]) -> float | None:
        size, total = self.config.per_device_eval_batch_size, 0.0
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self._autocast():
                for start in range(0, len(data), size):
                    if stop():
                        return None
                    indices = range(start, min(start + size, len(data)))
                    total += self._loss(self._batch(data, indices)).item()
        finally:
            self.model.train(was_training)
        return total / sum(data.labelled)

    def _save(self, run: RunDirectory, result: TrainResult) -> None:
        """Save what was trained, the tokenizer, the plot and the results; say where they lie."""
        steps = f"{len(result.losses)} of {self.total_steps} steps"
        if not result.losses:
            logger.warning("interrupted after %s: nothing was trained, nothing is saved", steps)
            return
        check_values(self.parameters, len(result.losses))
        saved = run.save_model(self.model)
        if self.tokenizer is not None and hasattr(self.tokenizer, "save"):
            self.tokenizer.save(run.path)
        run.plot(result.losses, result.eval_losses)
        run.write_json(RESULTS, result.metrics)
        if result.interrupted:
            logger.warning("interrupted after %s: their outcome is saved in %s", steps, saved)
        else:
            logger.info("%s done: saved in %s", steps, saved)

    def _resolved(self) -> dict[str, Any]:
        """The configuration as it is run, with what it is run on."""
        return {
            "train": self.config.to_dict(),
            "total_steps": self.total_steps,
            "train_examples": len(self.train_data),
            "eval_examples": 0 if self.eval_data is None else len(self.eval_data),
            "padding_free": self._packed,
            "model": type(self.model).__name__,
            "trainable_parameters": sum(p.numel() for p in self.parameters.values()),
            "device": str(self.device),
            "versions": versions(),
        }

    def _tokenize(self, data: Data, name: str) -> TokenizedExamples:
        if isinstance(data, TokenizedExamples):
            return data
        config = self.config
        vocab_size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        tokenized = tokenize_all(
            load_examples(data),
            self.tokenizer,
            config.max_length,
            config.completion_only_loss,
            vocab_size if isinstance(vocab_size, int) else None,
        )
        for note in tokenized.notes:
            logger.warning("%s data: %s", name, note)
        return tokenized

    def _step_batches(self, consumed: int) -> list[Batch]:
        config = self.config
        size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        parts = step_batches(len(self.train_data), size, accumulation, config.seed, consumed)
        return [self._batch(self.train_data, part) for part in parts]

    def _batch(self, data: TokenizedExamples, indices: Sequence[int]) -> Batch:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return collate(data, indices, self._packed, 0 if pad is None else pad).to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.config.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)
