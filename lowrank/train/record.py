"""What a run has done so far: every step counted, written to metrics.jsonl and shown."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.data import Batch
from lowrank.train.progress import Progress, peak_memory
from lowrank.train.run import RunDirectory


@dataclass
class TrainResult:
    """What a run came to.

    losses: mean loss per labelled token of each optimizer step.
    eval_losses: (steps done, mean loss per labelled token of the held-out data).
    metrics: what results.json holds: train_loss (mean of losses), eval_loss_before and _after,
        tokens_per_second (real tokens, no padding), steps_per_second, train_seconds (steps alone),
        wall_seconds, peak_memory_bytes (of the process), trainable_parameters, ...
    interrupted: Ctrl-C ended the run early, after len(losses) whole steps.
    """

    output_dir: Path
    losses: list[float]
    eval_losses: list[tuple[int, float]]
    metrics: dict[str, Any]
    interrupted: bool


class Record:
    """Counts the steps of a run; each is in metrics.jsonl and on the screen when `step` returns."""

    def __init__(
        self, run: RunDirectory, total_steps: int, examples: int, log_every: int, quiet: bool
    ) -> None:
        self._run, self._total_steps, self._examples = run, total_steps, examples
        self._progress = Progress(total_steps, log_every, quiet)
        self._begin = time.perf_counter()
        self._losses: list[float] = []
        self._eval_losses: list[tuple[int, float]] = []
        self._tokens = self._labelled = 0
        self._seconds = 0.0
        self.samples = 0

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self._losses)

    def step(
        self, batches: list[Batch], loss: float, grad_norm: float, lr: float, seconds: float
    ) -> None:
        """Count a finished step over `batches`."""
        tokens = sum(batch.tokens for batch in batches)
        labelled = sum(batch.labelled for batch in batches)
        self.samples += sum(batch.examples for batch in batches)
        self._tokens, self._labelled = self._tokens + tokens, self._labelled + labelled
        self._seconds += seconds
        self._losses.append(loss)
        line = {
            "step": self.steps,
            "epoch": round(self.samples / self._examples, 6),
            "loss": loss,
            "learning_rate": lr,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "labelled_tokens": labelled,
            "seconds": round(seconds, 6),
            "peak_memory_bytes": peak_memory(),
        }
        self._run.log(line)
        self._progress.step(line)

    def evaluation(self, loss: float) -> None:
        """Note the held-out loss after the steps done so far."""
        self._eval_losses.append((self.steps, loss))
        self._run.log({"step": self.steps, "eval_loss": loss})
        self._progress.line(f"step {self.steps}/{self._total_steps}: held-out loss {loss:.4f}")

    def result(
        self, trained: Iterable[nn.Parameter], device: torch.device, interrupted: bool
    ) -> TrainResult:
        """The run's result, with its metrics."""
        metrics: dict[str, Any] = {"steps": self.steps, "interrupted": interrupted}
        if self.steps:
            metrics["train_loss"] = sum(self._losses) / self.steps
            metrics["tokens_per_second"] = self._tokens / self._seconds
            metrics["steps_per_second"] = self.steps / self._seconds
        if self._eval_losses:
            metrics["eval_loss_before"] = self._eval_losses[0][1]
            if self._eval_losses[-1][0] == self.steps:
                metrics["eval_loss_after"] = self._eval_losses[-1][1]
        metrics["epochs"] = self.samples / self._examples
        metrics["tokens"], metrics["labelled_tokens"] = self._tokens, self._labelled
        metrics["train_seconds"] = self._seconds
        metrics["wall_seconds"] = time.perf_counter() - self._begin
        metrics["trainable_parameters"] = sum(p.numel() for p in trained)
        metrics["peak_memory_bytes"] = peak_memory()
        if device.type == "cuda":
            metrics["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        return TrainResult(self._run.path, self._losses, self._eval_losses, metrics, interrupted)

    def close(self) -> None:
        self._progress.close()
