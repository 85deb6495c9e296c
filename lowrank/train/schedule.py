"""Learning-rate schedules: the multiplier of the learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable


def linear(progress: float) -> float:
    """From 1 to 0 in a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0.   SGDR, arXiv:1608.03983, eq. 5."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


# progress 0..1 after warmup -> multiplier
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
}


def lr_multiplier(name: str, step: int, total: int, warmup: int) -> float:
    """Multiplier of the learning rate for step `step` (from 0) of `total`.

    step / warmup while step < warmup (a warmup's first step has rate 0, as in transformers), then
    the schedule over the steps that remain.
    """
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, SCHEDULES[name](min(1.0, (step - warmup) / max(1, total - warmup))))


def warmup_steps(total: int, steps: int | float, ratio: float) -> int:
    """Steps of warmup: `steps`, a share of `total` if below 1; `ratio` of `total` if it is 0."""
    if steps >= 1:
        return int(steps)
    return math.ceil(total * (steps or ratio))
