"""What a run shows of its steps: a line of metrics.jsonl each, the screen, and the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.train.feed import Counts
from lowrank.train.history import History
from lowrank.train.progress import Progress, peak_memory
from lowrank.train.run import RunDirectory
from lowrank.train.trackers import Trackers


@dataclass
class TrainResult:
    """What a run came to.

    losses: mean loss per labelled token of each optimizer step.
    eval_losses: (steps done, mean loss per labelled token of the held-out data).
    metrics: what results.json holds: train_loss (mean of losses), eval_loss_before and _after (of
        what is saved: the best, with load_best_model_at_end), best_step, tokens_per_second (real
        tokens, no padding), steps_per_second, train_seconds (steps alone), wall_seconds,
        peak_memory_bytes (of the process), trainable_parameters, ...
    interrupted: Ctrl-C ended the run early, after len(losses) whole steps.
    """

    output_dir: Path
    losses: list[float]
    eval_losses: list[tuple[int, float]]
    metrics: dict[str, Any]
    interrupted: bool


class Record:
    """Writes each step of a run's `history` to metrics.jsonl and to the screen, as it comes.

    With a `progress`, that of several runs at once, whoever has it shows the steps; what is said
    begins with `name`.
    """

    def __init__(
        self,
        run: RunDirectory,
        history: History,
        total_steps: int,
        examples: int,
        log_every: int | float,
        quiet: bool,
        device: torch.device,
        trackers: Trackers | None = None,
        progress: Progress | None = None,
        name: str = "",
    ) -> None:
        self._run, self._total_steps, self._examples = run, total_steps, examples
        self._history, self._device = history, device
        self._trackers = trackers or Trackers([])
        self._shows_steps, self._name = progress is None, name
        self._progress = progress or Progress(total_steps, log_every, quiet, done=history.steps)
        self._begin = time.perf_counter()

    def step(
        self, counts: Counts, loss: float, grad_norm: float, lr: float, seconds: float
    ) -> None:
        """Show the step, which the history has counted."""
        line = {
            "step": self._history.steps,
            "epoch": round(self._history.samples / self._examples, 6),
            "loss": loss,
            "learning_rate": lr,
            "grad_norm": grad_norm,
            "tokens": counts.tokens,
            "labelled_tokens": counts.labelled,
            "seconds": round(seconds, 6),
            **self._memory(),
        }
        self._run.log(line)
        self._trackers.step(line)
        if self._shows_steps:
            self._progress.step(line)

    def evaluation(self) -> None:
        """Show the last evaluation of the history."""
        line = self._history.evaluations[-1]
        self._run.log(line)
        self._trackers.evaluation(line)
        found = {name.removeprefix("eval_"): value for name, value in line.items()}
        step, loss = found.pop("step"), found.pop("loss")
        others = "".join(f", {name} {value:.4f}" for name, value in found.items())
        self.say(f"step {step}/{self._total_steps}: held-out loss {loss:.4f}{others}")

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Show a line of text, without breaking a bar."""
        self._progress.line(f"{self._name}: {text}" if self._name else text, level)

    def result(
        self, trained: Iterable[nn.Parameter], interrupted: bool, saved_step: int | None = None
    ) -> TrainResult:
        """The run's result, with its metrics; what is saved is of `saved_step`, or of the last."""
        history = self._history
        metrics: dict[str, Any] = {"steps": history.steps, "interrupted": interrupted}
        if history.steps:
            metrics["train_loss"] = sum(history.losses) / history.steps
            metrics["tokens_per_second"] = history.tokens / history.seconds
            metrics["steps_per_second"] = history.steps / history.seconds
        if history.best_step is not None:
            metrics["best_step"], metrics["best_metric"] = history.best_step, history.best_metric
        saved_step = history.steps if saved_step is None else saved_step
        for when, step in (("before", 0), ("after", saved_step)):
            for found in history.evaluations:
                if found["step"] == step:
                    metrics |= {f"{k}_{when}": v for k, v in found.items() if k != "step"}
        metrics["epochs"] = history.samples / self._examples
        metrics["tokens"], metrics["labelled_tokens"] = history.tokens, history.labelled
        metrics["train_seconds"] = history.seconds
        metrics["wall_seconds"] = time.perf_counter() - self._begin
        metrics["trainable_parameters"] = sum(p.numel() for p in trained)
        metrics |= self._memory()
        return TrainResult(
            self._run.path, history.losses, history.eval_losses, metrics, interrupted
        )

    def close(self, failed: bool = False) -> None:
        """Take the bar away, and end what was reported to; `failed`: the run raised an error."""
        self._progress.close()
        self._trackers.close(failed)

    def _memory(self) -> dict[str, int]:
        """The most that was used so far, of the process and of the GPU if that is the device."""
        used = {"peak_memory_bytes": peak_memory()}
        if self._device.type == "cuda":
            used["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(self._device)
        return used
