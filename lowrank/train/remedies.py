"""What ails a run, seen from its losses or its end, and the remedy, in one line."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from lowrank.surgery.checkpointing import can_checkpoint
from lowrank.surgery.count import count_parameters
from lowrank.train.callbacks import Callback
from lowrank.train.config import TrainConfig

if TYPE_CHECKING:
    from lowrank.train.history import History
    from lowrank.train.record import Record

_WINDOW = 5  # steps whose mean loss is looked at
_RECENT = 200  # steps within which the loss is compared
_RISE, _NOISES = 1.3, 4  # unstable: above this multiple of the best, by so many times the noise
_JUMP = 2.0  # and in the first steps, above this multiple of the held-out loss before them
_WORSE = 1.01  # overfitting: the held-out loss over its best
_FEW_STEPS, _HARDLY = 10, 0.02  # underfitting: from so many steps on, the loss fell by less
_LARGE = 50_000_000  # trained parameters whose optimizer is worth shrinking


class Watched(Protocol):
    """What is looked at of a run, and where a line is said: a Loop, or one of several adapters."""

    @property
    def history(self) -> History: ...
    @property
    def config(self) -> TrainConfig: ...
    @property
    def record(self) -> Record: ...
    @property
    def total_steps(self) -> int: ...


class Remedies(Callback):
    """Says what to do about a run that is unstable, overfits or underfits; each at most once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def on_step_end(self, loop: Watched) -> None:
        history = loop.history
        before = next((loss for step, loss in history.eval_losses[:1] if not step), math.inf)
        self._say(loop, "instability", instability(history.losses, loop.config, before))

    def on_evaluate(self, loop: Watched) -> None:
        history = loop.history
        ended = history.steps >= loop.total_steps
        found = overfitting(history.losses, history.eval_losses, ended)
        self._say(loop, "overfitting", found)

    def on_train_end(self, loop: Watched) -> None:
        if loop.history.steps >= loop.total_steps and not self._said:
            self._say(loop, "underfitting", underfitting(loop.history.losses, loop.config))

    def _say(self, loop: Watched, what: str, remedy: str | None) -> None:
        if remedy is not None and what not in self._said:
            self._said.add(what)
            loop.record.say(f"{what}: {remedy}", logging.WARNING)


def instability(
    losses: Sequence[float], config: TrainConfig, held_out: float = math.inf
) -> str | None:
    """The remedy if the mean of the last losses is far above the lowest such mean before; in the
    first steps, of which there is none, far above `held_out`, the loss before training.

    Far is more than the losses vary from step to step, so that small batches are no alarm.
    """
    if len(losses) < _WINDOW:
        return None
    now = sum(losses[-_WINDOW:]) / _WINDOW
    if len(losses) < 3 * _WINDOW:
        best, least = held_out, _JUMP * held_out
    else:
        earlier = losses[-_RECENT:-_WINDOW]
        noise = statistics.median(abs(b - a) for a, b in zip(earlier, earlier[1:], strict=False))
        sums = [sum(earlier[:_WINDOW])]
        for old, new in zip(earlier, earlier[_WINDOW:], strict=False):
            sums.append(sums[-1] + new - old)
        best = min(sums) / _WINDOW
        least = max(_RISE * best, best + _NOISES * noise)
    if now < least:
        return None
    return (
        f"the loss rose from {best:.3g} to {now:.3g} by step {len(losses)}: halve learning_rate "
        f"({config.learning_rate:g} → {config.learning_rate / 2:g}), or raise warmup_ratio "
        f"({config.warmup_ratio:g} → 0.1), or lower max_grad_norm ({config.max_grad_norm:g} → 0.3)"
    )


def overfitting(
    losses: Sequence[float], eval_losses: Sequence[tuple[int, float]], ended: bool
) -> str | None:
    """The remedy if the held-out loss has risen twice in a row, or is above its best when the run
    has ended, while the training loss fell.
    """
    if len(eval_losses) < 2:
        return None
    at, best = min(eval_losses, key=lambda pair: pair[1])
    step, now = eval_losses[-1]
    rising = sum(there > at for there, _ in eval_losses) >= 2 and now > eval_losses[-2][1]
    if now < _WORSE * best or not (rising or ended) or step == at:
        return None
    before, since = losses[max(0, 2 * at - step) : at], losses[at:step]
    if before and sum(since) / len(since) > sum(before) / len(before):
        return None  # both rose: that is something else
    stop = f"stop at about step {at} (num_train_epochs, max_steps)"
    if not at:  # none was better than that before training
        if sum(since[-_WINDOW:]) / len(since[-_WINDOW:]) > since[0]:
            return None
        stop = "stop earlier (a smaller eval_steps shows where)"
    return (
        f"the held-out loss rose from {best:.4f} after step {at} to {now:.4f} after step {step} "
        f"while the training loss fell: {stop}, "
        "raise lora_dropout (0.1), lower r, or train on more data"
    )


def underfitting(losses: Sequence[float], config: TrainConfig) -> str | None:
    """The remedy if the loss of the last fifth of the run is hardly below that of the first, or
    far above that of the first step; if it was far above in between, that of too high a rate.
    """
    if len(losses) < _FEW_STEPS:
        return None
    fifth = len(losses) // 5
    first, last = sum(losses[:fifth]) / fifth, sum(losses[-fifth:]) / fifth
    if last < (1 - _HARDLY) * first:
        return None
    highest = max(sum(losses[i : i + _WINDOW]) for i in range(len(losses) - _WINDOW)) / _WINDOW
    # at once, so that no mean before was lower
    if last > _RISE * losses[0] or highest > _JUMP * max(losses[0], last):
        return (
            f"the training loss rose, {losses[0]:.4f} to {max(last, highest):.4f}: lower "
            f"learning_rate ({config.learning_rate:g} → {config.learning_rate / 10:g})"
        )
    return (
        f"the training loss hardly moved, {first:.4f} to {last:.4f}: raise learning_rate "
        f"({config.learning_rate:g} → {3 * config.learning_rate:g}), train longer, raise r, or "
        'adapt more layers (target_modules="all-linear")'
    )


def out_of_memory(config: TrainConfig, model: nn.Module) -> str:
    """What to change, of what is not yet done, so that a run needs less memory."""
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    remedies = []
    if size > 1 and not config.auto_find_batch_size:
        part = next(n for n in range(size // 2, 0, -1) if size % n == 0)
        remedies.append(
            f"per_device_train_batch_size={part} with gradient_accumulation_steps="
            f"{accumulation * (size // part)}, which learns the same "
            "(auto_find_batch_size=True does it)"
        )
    if not config.gradient_checkpointing and can_checkpoint(model):
        remedies.append("gradient_checkpointing=True")
    if all(p.is_floating_point() for p in model.parameters()):
        remedies.append('load_model(quantizer="nf4")')
    trained, _ = count_parameters(model)
    if trained > _LARGE and "8bit" not in config.optim:
        remedies.append('optim="paged_adamw_8bit"')
    remedies.append(f"max_length below {config.max_length}")
    return ", or ".join(remedies)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    # on a CPU torch raises no type of its own
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
