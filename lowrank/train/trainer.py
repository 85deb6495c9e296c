"""The training loop: any module that predicts tokens, its trainable parameters, a config, and data."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
from lowrank.train.config import TrainConfig
from lowrank.train.gradients import (
    can_checkpoint,
    check_gradients,
    clip,
    gradient_checkpointing,
    trainable_parameters,
)
from lowrank.train.interrupt import Interrupt
from lowrank.train.loss import batch_loss, packs
from lowrank.train.optimizer import OPTIMIZERS
from lowrank.train.progress import Progress, peak_memory
from lowrank.train.run import CONFIG, RESULTS, RunDirectory, check_output_dir, versions
from lowrank.train.schedule import lr_multiplier, warmup_steps

logger = logging.getLogger("lowrank.train")

Data = str | Path | Sequence[Mapping[str, Any]] | TokenizedExamples


@dataclass
class TrainResult:
    """What a run came to.

    losses: mean loss per labelled token of each optimizer step; eval_losses: (steps done, mean loss per
    labelled token of eval_data). `interrupted`: Ctrl-C ended it early, after len(losses) whole steps.
    """

    output_dir: Path
    losses: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False


class Trainer:
    """Trains the parameters of `model` that require a gradient, on next-token prediction.

    The loss of a step is the sum over the labelled tokens of all its micro-batches, divided by their number, so
    that accumulation over unequal batches equals one large batch. `train_data` and `eval_data`: a path, a
    sequence of dicts (see `lowrank.data.load_examples`), or what `tokenize_all` returned. Raises ConfigError
    or DataError here for all that can be known before the first step.
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
        self.model, self.config, self.tokenizer = model, config, tokenizer
        if config.gradient_checkpointing and not can_checkpoint(model):
            raise ConfigError(
                f"gradient_checkpointing is on, but {type(model).__name__} has no attribute of that name to "
                "switch: turn it off, or give the model one"
            )
        self.parameters = trainable_parameters(model)
        self.device = next(iter(self.parameters.values())).device
        self.train_data = self._tokenize(train_data, "training")
        self.eval_data = None if eval_data is None else self._tokenize(eval_data, "held-out")
        self.steps_per_epoch = steps_per_epoch(
            len(self.train_data),
            config.per_device_train_batch_size * config.gradient_accumulation_steps,
        )
        self.total_steps = config.max_steps
        if config.max_steps < 0:
            self.total_steps = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        pad = getattr(tokenizer, "pad_token_id", None)
        self._pad_token_id = 0 if pad is None else pad
        self._packed = config.padding_free and packs(model)
        self._loss = batch_loss(model)

    def train(self) -> TrainResult:
        """Run all steps, evaluate before and after, save; returns losses and metrics.

        Ctrl-C ends the run after the last whole step: what was trained by then is saved and the result says
        `interrupted`. TrainingError, with nothing saved, if the loss or the gradient is not finite.
        """
        config = self.config
        torch.manual_seed(config.seed)
        run = RunDirectory(config.output_dir, config.overwrite_output_dir)
        result = TrainResult(run.path)
        was_training = self.model.training
        try:
            run.write_json(CONFIG, self._resolved())
            with (
                Interrupt() as interrupt,
                gradient_checkpointing(self.model, config.gradient_checkpointing),
            ):
                self.model.train()
                self._run(run, result, interrupt)
                self._finish(run, result)
        finally:
            run.close()
            self.model.train(was_training)
            self.model.zero_grad(set_to_none=True)
        return result

    def evaluate(self, interrupt: Interrupt | None = None) -> float | None:
        """Mean loss per labelled token of eval_data, without dropout; None if interrupted."""
        if self.eval_data is None:
            raise ConfigError(
                "evaluate needs eval_data; the Trainer was made without: pass eval_data="
            )
        data, size = self.eval_data, self.config.per_device_eval_batch_size
        was_training = self.model.training
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        try:
            with torch.no_grad(), self._autocast():
                for start in range(0, len(data), size):
                    if interrupt is not None and interrupt.requested:
                        return None
                    total += self._loss(
                        self._batch(data, range(start, min(start + size, len(data))))
                    )
        finally:
            self.model.train(was_training)
        return total.item() / sum(data.labelled)

    def _run(self, run: RunDirectory, result: TrainResult, interrupt: Interrupt) -> None:
        config = self.config
        optimizer = OPTIMIZERS[config.optim](self.parameters.values(), config)
        warmup = warmup_steps(self.total_steps, config.warmup_steps, config.warmup_ratio)
        progress = Progress(self.total_steps, config.logging_steps, config.disable_tqdm)
        count, begin = _Count(), time.perf_counter()
        try:
            self._evaluate(run, result, progress, interrupt)
            for step in range(1, self.total_steps + 1):
                start = time.perf_counter()
                batches = self._step_batches(count.samples)
                rate = lr_multiplier(config.lr_scheduler_type, step - 1, self.total_steps, warmup)
                done = self._step(
                    step, batches, optimizer, rate * config.learning_rate, result, interrupt
                )
                if done is None:
                    break
                took = time.perf_counter() - start
                count.add(batches, took)
                loss, norm = done
                result.losses.append(loss)
                line = {
                    "step": step,
                    "epoch": round(count.samples / len(self.train_data), 6),
                    "loss": loss,
                    "learning_rate": rate * config.learning_rate,
                    "grad_norm": norm,
                    "tokens": sum(batch.tokens for batch in batches),
                    "labelled_tokens": sum(batch.labelled for batch in batches),
                    "seconds": round(took, 6),
                    "peak_memory_bytes": peak_memory(),
                }
                run.log(line)
                progress.step(line)
                if config.eval_steps and step % config.eval_steps == 0 or step == self.total_steps:
                    self._evaluate(run, result, progress, interrupt)
        finally:
            progress.close()
        result.interrupted = interrupt.requested and len(result.losses) < self.total_steps
        result.metrics = self._metrics(result, count, time.perf_counter() - begin)

    def _step(
        self,
        step: int,
        batches: list[Batch],
        optimizer: torch.optim.Optimizer,
        lr: float,
        result: TrainResult,
        interrupt: Interrupt,
    ) -> tuple[float, float] | None:
        """One optimizer step; the loss and the gradient's norm before clipping, or None if interrupted."""
        scale = 1.0 / sum(batch.labelled for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            if interrupt.requested:
                return None
            with self._autocast():
                loss = self._loss(batch) * scale
            loss.backward()
            total += loss.detach()
        if step == 1:
            check_gradients(self.parameters)
        norm = clip(self.parameters.values(), self.config.max_grad_norm)
        loss_value, norm_value = torch.stack(
            [total, norm.to(total)]
        ).tolist()  # the step's one wait for the device
        for what, value in (("loss", loss_value), ("gradient norm", norm_value)):
            if not math.isfinite(value):
                last = (
                    f"; the loss of step {step - 1} was {result.losses[-1]:.4f}"
                    if result.losses
                    else ""
                )
                raise TrainingError(
                    f"step {step}: the {what} is {value}{last}; the run stops with the parameters of step {step - 1} "
                    "and saves nothing: lower learning_rate, or look at the data and the weights"
                )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss_value, norm_value

    def _evaluate(
        self, run: RunDirectory, result: TrainResult, progress: Progress, interrupt: Interrupt
    ) -> None:
        """Evaluate, if there is eval_data, and note the loss at the steps done so far."""
        if self.eval_data is None:
            return
        loss = self.evaluate(interrupt)
        if loss is None:
            return
        step = len(result.losses)
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {step}: the held-out loss is {loss}: look at the data and the weights"
            )
        result.eval_losses.append((step, loss))
        run.log({"step": step, "eval_loss": loss})
        progress.line(f"step {step}/{self.total_steps}: held-out loss {loss:.4f}")

    def _finish(self, run: RunDirectory, result: TrainResult) -> None:
        """Save what was trained, the tokenizer, the plot and the results; say where they lie."""
        steps = f"{len(result.losses)} of {self.total_steps} steps"
        if not result.losses:
            logger.warning("interrupted after %s: nothing was trained and nothing is saved", steps)
            return
        saved = run.save_model(self.model)
        if hasattr(self.tokenizer, "save"):
            self.tokenizer.save(run.path)
        run.plot(result.losses, result.eval_losses)
        run.write_json(RESULTS, result.metrics)
        if result.interrupted:
            logger.warning(
                "interrupted after %s: what was trained by then is saved in %s", steps, saved
            )
        else:
            logger.info("%s done: saved in %s", steps, saved)

    def _metrics(self, result: TrainResult, count: _Count, wall: float) -> dict[str, Any]:
        metrics: dict[str, Any] = {"steps": len(result.losses), "interrupted": result.interrupted}
        if result.losses:
            metrics["train_loss"] = sum(result.losses) / len(result.losses)
            metrics["tokens_per_second"] = count.tokens / count.seconds
            metrics["steps_per_second"] = len(result.losses) / count.seconds
        if result.eval_losses:
            metrics["eval_loss_before"] = result.eval_losses[0][1]
            metrics["eval_loss_after"] = result.eval_losses[-1][1]
        metrics["epochs"] = count.samples / len(self.train_data)
        metrics["tokens"], metrics["labelled_tokens"] = count.tokens, count.labelled
        metrics["train_seconds"], metrics["wall_seconds"] = count.seconds, wall
        metrics["trainable_parameters"] = sum(p.numel() for p in self.parameters.values())
        metrics["peak_memory_bytes"] = peak_memory()
        if self.device.type == "cuda":
            metrics["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return metrics

    def _resolved(self) -> dict[str, Any]:
        """The configuration as it was run, with what it was run on."""
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
        tokenized = tokenize_all(
            load_examples(data), self.tokenizer, config.max_length, config.completion_only_loss
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
        return collate(data, indices, self._packed, self._pad_token_id).to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if not self.config.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


@dataclass
class _Count:
    """What the steps so far have taken."""

    samples: int = 0
    tokens: int = 0
    labelled: int = 0
    seconds: float = 0.0

    def add(self, batches: list[Batch], seconds: float) -> None:
        self.samples += sum(batch.examples for batch in batches)
        self.tokens += sum(batch.tokens for batch in batches)
        self.labelled += sum(batch.labelled for batch in batches)
        self.seconds += seconds
