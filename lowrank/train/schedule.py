"""Learning-rate schedules: the multiplier of the learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# progress 0..1 -> from 1 to 0; as transformers names them
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    # half a cosine.   SGDR, arXiv:1608.03983, eq. 5
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


class Schedule(NamedTuple):
    """A schedule: its multiplier after `step` of the `total` steps that follow the warmup.

    options: what lr_scheduler_kwargs may set, with the defaults.
    """

    multiplier: Callable[..., float]
    options: Mapping[str, float | str] = {}
    warms_up: bool = True


def linear(step: int, total: int) -> float:
    """From 1 to 0 in a straight line."""
    return SHAPES["linear"](_share(step, total))


def cosine(step: int, total: int) -> float:
    """Half a cosine from 1 to 0."""
    return SHAPES["cosine"](_share(step, total))


def cosine_with_min_lr(step: int, total: int, min_lr_rate: float) -> float:
    """Half a cosine from 1 to `min_lr_rate`."""
    return _above(min_lr_rate, cosine(step, total))


def constant(step: int, total: int) -> float:
    """1 throughout."""
    return 1.0


def warmup_stable_decay(
    step: int, total: int, num_decay_steps: float, min_lr_ratio: float, decay_type: str
) -> float:
    """1, and in the last `num_decay_steps` (below 1: a share) to `min_lr_ratio`.

    MiniCPM, arXiv:2404.06395, §4.
    """
    decay = num_decay_steps if num_decay_steps >= 1 else math.ceil(num_decay_steps * total)
    before = total - decay
    if step < before:
        return 1.0
    return _above(min_lr_ratio, SHAPES[decay_type](_share(step - before, decay)))


SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(linear),
    "cosine": Schedule(cosine),
    "cosine_with_min_lr": Schedule(cosine_with_min_lr, {"min_lr_rate": 0.1}),
    "constant": Schedule(constant, warms_up=False),
    "constant_with_warmup": Schedule(constant),
    "warmup_stable_decay": Schedule(
        warmup_stable_decay, {"num_decay_steps": 0.1, "min_lr_ratio": 0.0, "decay_type": "cosine"}
    ),
}


def lr_multiplier(
    name: str, step: int, total: int, warmup: int, options: Mapping[str, Any] | None = None
) -> float:
    """Multiplier of the learning rate for step `step` (from 0) of `total`.

    In the first `warmup` steps it rises from 0 (warmup_stable_decay: from min_lr_ratio), where it
    is in the very first, as in transformers; then the schedule has the steps that remain.
    """
    schedule = SCHEDULES[name]
    options = {**schedule.options, **(options or {})}
    if not schedule.warms_up:
        warmup = 0
    if step < warmup:
        return _above(options.get("min_lr_ratio", 0.0), step / warmup)
    return max(0.0, schedule.multiplier(step - warmup, total - warmup, **options))


def warmup_steps(total: int, steps: int | float, ratio: float) -> int:
    """Steps of warmup: `steps`, a share of `total` if below 1; `ratio` of `total` if it is 0."""
    return whole_steps(steps, total) if steps else math.ceil(total * ratio)


def whole_steps(steps: int | float, total: int) -> int:
    """A number of steps, or as many as a share of `total` is if it is below 1."""
    return int(steps) if steps >= 1 else math.ceil(steps * total)


def _share(step: float, total: float) -> float:
    """How much of `total` is over, 0..1."""
    return min(1.0, step / max(1, total))


def _above(low: float, multiplier: float) -> float:
    """`multiplier` of 0..1 as one of low..1."""
    return low + (1.0 - low) * multiplier
